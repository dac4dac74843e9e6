from glm_image.serving.stream_backend import ArStreamBackend as TritonPythonModel

__all__ = ["TritonPythonModel"]
