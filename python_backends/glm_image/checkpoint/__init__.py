"""A checkpoint folder on disk, and its tensors."""
