"""Labelled tasks (GLUE, SQuAD, a user's own): from rows to scores.

Read specs.py, load.py and train.py first.
May import errors, mapping, config, records, ranks, kernels, data, models, losses and train.
"""
