"""GLM-130B, on transformers' base classes."""
