"""The loss kernels: reference.py is the definition of correct; PyTorch and Triton compute the same faster.

Read inputs.py and reference.py first, then choice.py, which picks an implementation and says which.
May import errors and config.
"""
