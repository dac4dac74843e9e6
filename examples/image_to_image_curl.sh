#!/usr/bin/env bash
# Edits edit_before.png with plain JSON: the source image travels as base64.
set -euo pipefail

python3 - <<'END' > request.json
import base64, json
from pathlib import Path

source = "data:image/png;base64," + base64.b64encode(Path("edit_before.png").read_bytes()).decode()
print(json.dumps({
    "prompt": "Paint the blue square red", "image": [source],
    "width": 256, "height": 256, "num_inference_steps": 20, "seed": 42, "output_format": "png",
}))
END
curl -sf --data @request.json 127.0.0.1:8000/v2/models/glm_image/generate > response.json
python3 -c 'import json; print(end=json.load(open("response.json"))["images_base64"])' | base64 -d > edit_json.png
