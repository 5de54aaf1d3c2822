"""Triton kernels, one file for each kind of operation. `gpu` is the door to them: it says which run where.

Importing a module of this package loads Triton; nothing else does. With `TRITON_INTERPRET=1` in the environment before
that, every kernel runs on a CPU, slowly: that is how their tests work without a GPU. Each has a twin in `plain`.
"""
