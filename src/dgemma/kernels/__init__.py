"""Fast operations for processors: one operation, one contract; each has a twin in plain torch that says what it is.

`cpu` has the operations, `reference` the twins, `native` the compiled library and the choice of its instruction set.
Nothing here loads torch or the library before it is used.
"""
