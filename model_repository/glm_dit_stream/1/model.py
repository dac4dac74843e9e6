from glm_image.serving.stream_backend import DitStreamBackend as TritonPythonModel

__all__ = ["TritonPythonModel"]
