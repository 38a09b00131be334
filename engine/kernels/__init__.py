"""Loss kernels: `reference` is the definition of correct."""
