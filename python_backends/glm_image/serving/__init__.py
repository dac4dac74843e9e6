"""The Triton Python models: the only modules that import ``triton_python_backend_utils``."""
