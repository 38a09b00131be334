"""The search for a layer mapping: an Optuna study whose trials are proxy jobs of engine/.

Read search.py and loop.py first, then evolution/, jobs/ and study/.
Free of torch: of engine/ it imports only errors, mapping, config, records and cli.
"""
