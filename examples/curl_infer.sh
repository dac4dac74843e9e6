#!/usr/bin/env bash
# One image over the KServe v2 infer endpoint: typed tensors as JSON.
set -euo pipefail

curl -sf 127.0.0.1:8000/v2/models/glm_image/infer -d '{"inputs": [
  {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["A red fox reading a newspaper that says “NEWS”"]},
  {"name": "width", "datatype": "INT32", "shape": [1], "data": [256]},
  {"name": "height", "datatype": "INT32", "shape": [1], "data": [256]},
  {"name": "num_inference_steps", "datatype": "INT32", "shape": [1], "data": [20]},
  {"name": "seed", "datatype": "INT64", "shape": [1], "data": [42]},
  {"name": "output_format", "datatype": "BYTES", "shape": [1], "data": ["png"]}
], "outputs": [{"name": "images_base64"}]}' > response.json
python3 -c 'import json; print(end=json.load(open("response.json"))["outputs"][0]["data"][0])' | base64 -d > infer.png
