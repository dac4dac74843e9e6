#!/usr/bin/env bash
# Generates an image over OpenAI's image API: images.sh [WIDTH HEIGHT] writes resp.json and output_t2i_WIDTHxHEIGHT.png.
set -euo pipefail
width=${1:-256} height=${2:-256}

curl -sf http://127.0.0.1:8080/v1/images/generations -H 'Content-Type: application/json' -d '{
  "model": "glm-image",
  "prompt": "A red fox reading a newspaper that says “NEWS”",
  "size": "'"${width}x$height"'", "response_format": "b64_json",
  "num_inference_steps": 20, "seed": 42
}' > resp.json
python3 -c 'import json; print(end=json.load(open("resp.json"))["data"][0]["b64_json"])' |
  base64 -d > "output_t2i_${width}x$height.png"
