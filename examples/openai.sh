#!/usr/bin/env bash
# Generates an image over OpenAI's chat API: openai.sh [WIDTH HEIGHT] writes resp.json and output_t2i_WIDTHxHEIGHT.png.
set -euo pipefail
width=${1:-256} height=${2:-256}

curl -sf http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' -d '{
  "messages": [{"role": "user", "content": "A red fox reading a newspaper that says “NEWS”"}],
  "extra_body": {"width": '"$width"', "height": '"$height"', "num_inference_steps": 20, "seed": 42}
}' > resp.json
python3 -c 'import json
content = json.load(open("resp.json"))["choices"][0]["message"]["content"]
print(end=content[0]["image_url"]["url"].partition(",")[2])' | base64 -d > "output_t2i_${width}x$height.png"
