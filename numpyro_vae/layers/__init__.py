"""flax's layers, fast on CPU."""
