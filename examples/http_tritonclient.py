"""One image as a PNG file over HTTP, with tritonclient."""

import base64
from pathlib import Path

import numpy as np
import tritonclient.http as triton

DATATYPES = {np.dtype(object): "BYTES", np.dtype(np.int32): "INT32", np.dtype(np.int64): "INT64"}

values = {
    "prompt": np.array(["A red fox reading a newspaper that says “NEWS”".encode()], dtype=object),
    "width": np.array([256], dtype=np.int32),
    "height": np.array([256], dtype=np.int32),
    "num_inference_steps": np.array([20], dtype=np.int32),
    "seed": np.array([42], dtype=np.int64),
    "output_format": np.array([b"png"], dtype=object),
}
inputs = []
for name, array in values.items():
    inputs.append(triton.InferInput(name, [1], DATATYPES[array.dtype]))
    inputs[-1].set_data_from_numpy(array)

client = triton.InferenceServerClient("127.0.0.1:8000", network_timeout=600)
response = client.infer("glm_image", inputs)
Path("http.png").write_bytes(base64.b64decode(response.as_numpy("images_base64")[0]))
