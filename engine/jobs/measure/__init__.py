"""launch/measure.py: how large and how fast encoders are on this machine, beside the first of them.

Read encoders.py first, then job.py; turns.py is what benchmarks/ time with, too.
"""
