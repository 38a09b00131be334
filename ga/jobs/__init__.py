"""Proxy jobs: where they run, how they are started and ended, and what became of them.

Read pool.py first, then launcher.py and outcome.py.
May import of ga/ only evolution and config.
"""
