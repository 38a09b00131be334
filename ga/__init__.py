"""The search over layer mappings. Torch-free; nothing is implemented here yet (it has an issue of its own)."""
