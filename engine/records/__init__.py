"""What a run leaves behind, and its readers: its folder, records, curves, fingerprints; and who writes there: locks,
processes.

Read run_dir.py and records.py first; the others stand alone.
May import errors; never torch, transformers or deepspeed.
"""
