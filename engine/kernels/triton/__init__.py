"""The loss kernels in Triton, for GPUs; imported only where Triton is installed.

Read common.py first.
May import errors, config and the neighbours in engine/kernels/ but choice.py.
"""
