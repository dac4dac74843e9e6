"""One image as raw pixels over gRPC, with tritonclient."""

import json

import numpy as np
import tritonclient.grpc as triton
from PIL import Image


def tensor(name: str, datatype: str, values: np.ndarray) -> triton.InferInput:
    tensor = triton.InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values)
    return tensor


prompt = "A red fox reading a newspaper that says “NEWS”"
pings = triton.KeepAliveOptions(keepalive_time_ms=30_000, http2_max_pings_without_data=0)
client = triton.InferenceServerClient("127.0.0.1:8001", keepalive_options=pings)
response = client.infer(
    "glm_image",
    [
        tensor("prompt", "BYTES", np.array([prompt.encode()], dtype=object)),
        tensor("width", "INT32", np.array([256], dtype=np.int32)),
        tensor("height", "INT32", np.array([256], dtype=np.int32)),
        tensor("num_inference_steps", "INT32", np.array([20], dtype=np.int32)),
        tensor("guidance_scale", "FP32", np.array([1.5], dtype=np.float32)),
        tensor("seed", "INT64", np.array([42], dtype=np.int64)),
    ],
)
Image.fromarray(response.as_numpy("images")[0]).save("grpc.png")
print(json.loads(response.as_numpy("metadata")[0])["seconds"])
