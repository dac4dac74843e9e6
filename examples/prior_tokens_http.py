"""Both stages called one after the other over HTTP, with the standard library alone."""

import base64
import json
from pathlib import Path
from urllib.request import urlopen


def infer(model: str, inputs: list[dict]) -> list[dict]:
    body = json.dumps({"inputs": inputs}).encode()
    with urlopen(f"http://127.0.0.1:8000/v2/models/{model}/infer", body) as response:
        return json.load(response)["outputs"]


def value(name: str, datatype: str, data: object) -> dict:
    return {"name": name, "datatype": datatype, "shape": [1], "data": [data]}


prompt = value("prompt", "BYTES", "A red fox reading a newspaper that says “NEWS”")
size = [value("width", "INT32", 256), value("height", "INT32", 256)]
tokens = infer("glm_ar", [prompt, *size, value("seed", "INT64", 42)])

kept = [tensor for tensor in tokens if tensor["name"] != "deadline_ns"]
steps = value("num_inference_steps", "INT32", 20)
outputs = infer("glm_dit", [prompt, *kept, steps, value("output_format", "BYTES", "png")])
file = next(tensor["data"][0] for tensor in outputs if tensor["name"] == "images_base64")
Path("plain.png").write_bytes(base64.b64decode(file))
