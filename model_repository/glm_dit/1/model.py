from glm_image.serving.dit_backend import DitBackend as TritonPythonModel

__all__ = ["TritonPythonModel"]
