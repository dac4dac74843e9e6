"""What fits which device: memory needs, composed of the formulas beside the engines."""
