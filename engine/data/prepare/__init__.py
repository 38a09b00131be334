"""launch/prepare_data.py: raw text, tokenised and packed into memory-mapped shards.

Read corpus.py first, then units.py and packing.py.
May import errors, config, records and the neighbours in engine/data/.
"""
