"""What a user may write: frozen dataclasses with every default, DeepSpeed's file, the hostfile.

Read distill.py first, then reading.py (from files and command line to a configuration), then deepspeed.py.
May import errors and mapping; never torch, transformers or deepspeed.
"""
