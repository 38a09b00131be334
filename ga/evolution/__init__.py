"""The genetic algorithm: genomes, operators on them, the sampler that Optuna asks, and a model of what genes are worth.

Read genome.py first, then operators.py and effects.py; all are pure, and each random operator is given its generator.
May import of engine/ only errors and mapping, and of ga/ only optuna_private.
"""
