"""Where tensors live and steps run: one interface over the CPU, CUDA GPUs and Ascend NPUs; discovery and placement."""
