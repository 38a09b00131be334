"""One file per objective, over the layer pairs of a mapping.

Read base.py first (Pair, Loss), then hidden.py and loss_set.py.
May import errors, mapping, config, kernels, data and models.
"""
