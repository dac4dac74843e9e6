from glm_image.serving.stream_backend import StreamBackend as TritonPythonModel

__all__ = ["TritonPythonModel"]
