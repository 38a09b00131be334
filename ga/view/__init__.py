"""A search while it runs: its lines, its bar, its TensorBoard.

Read live.py first.
May import of ga/ only evolution, config, jobs and study.
"""
