"""Files of tensors: reading and writing model folders, what ties a checkpoint to its base, DeepSpeed's own files."""
