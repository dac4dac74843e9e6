"""Checkpoint folders and their tensors."""
