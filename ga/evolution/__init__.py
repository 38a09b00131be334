"""The genetic algorithm: genomes, operators on them, and the sampler that Optuna asks.

Read genome.py first, then operators.py; both are pure, and each random operator is given its generator.
May import of engine/ only errors and mapping, and of ga/ only optuna_private.
"""
