#!/usr/bin/env bash
# One image over Triton's generate endpoint: plain JSON in, JSON out.
set -euo pipefail

curl -sf 127.0.0.1:8000/v2/models/glm_image/generate -d '{
  "prompt": "A red fox reading a newspaper that says “NEWS”",
  "width": 256, "height": 256, "num_inference_steps": 20, "seed": 42, "output_format": "png"
}' > response.json
python3 -c 'import json; print(end=json.load(open("response.json"))["images_base64"])' | base64 -d > generate.png
