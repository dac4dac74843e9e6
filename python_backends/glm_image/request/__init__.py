"""What a caller may ask: parameters, limits, geometry, prompts and images. Imports no torch."""
