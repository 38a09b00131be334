"""Corpus preparation, training order and masking."""
