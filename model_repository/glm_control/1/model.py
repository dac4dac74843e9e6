from glm_image.serving.control_backend import ControlBackend as TritonPythonModel

__all__ = ["TritonPythonModel"]
