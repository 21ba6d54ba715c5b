"""How benchmarks score: a file for each, which gives the numbers of the benchmark's own public code.

A protocol has two halves: what one answer gives (numbers that a record can hold), and what many of them give together.
Both are pure. Where several conventions are in use under one name, each has its own name here.
"""
