"""The measurement of one GPU: each question is a row, answered by the product's own code.

`__main__` starts `worker`, starts it again after a crash, and stops it in time; `rows` lists the rows in order.
A new row is an entry there. The product imports nothing from here.
"""
