"""The hour on a GPU: each thing worth knowing of one machine is a row, measured by the product's own code.

`__main__` starts `worker`, again where it dies, and stops it in time; `rows` says what is measured and in which order.
A new row is an entry there. Nothing here is imported by the product.
"""
