"""The Triton side: the only modules that know ``triton_python_backend_utils``."""
