"""The search as an Optuna study: its storage, its locks, its trials, and the drivers that share it.

Read evaluations.py and ledger.py first, then sources.py and storage.py.
May import of ga/ only evolution, config, jobs and optuna_private.
"""
