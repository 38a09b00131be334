"""Batches of a prepared corpus; prepare/ makes the corpus from raw text.

Read batch.py and loader.py first, then order.py and shards.py.
May import errors, config, records, hub, ranks and kernels.
"""
