"""What a user may write: frozen dataclasses with every default, DeepSpeed's file, the hostfile.

Read distill.py first, then deepspeed.py; the others follow them.
May import errors and mapping; never torch, transformers or deepspeed.
"""
