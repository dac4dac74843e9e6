"""Checks of prompts and images by a hook that an operator configures."""
