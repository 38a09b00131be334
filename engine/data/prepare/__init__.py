"""launch/prepare_data.py: raw text, tokenised and packed into memory-mapped shards.

Read corpus.py first, then selection.py and contents.py (what is read), units.py and packing.py (what becomes of it).
May import errors, config, records and the neighbours in engine/data/.
"""
