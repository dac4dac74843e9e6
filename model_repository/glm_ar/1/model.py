from glm_image.serving.ar_backend import ArBackend as TritonPythonModel

__all__ = ["TritonPythonModel"]
