"""Calls of LiteLLM against a gateway; a program for an environment of its own: litellm_calls.py URL FILE."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import litellm

COMMON: dict[str, Any] = {"model": "openai/glm-image", "api_base": f"{sys.argv[1]}/v1", "api_key": "none"}
SMALL: dict[str, Any] = {"size": "64x64", "extra_body": {"num_inference_steps": 2, "seed": 7}}
PROMPT = "A red fox"

answer = litellm.image_generation(prompt=PROMPT, **SMALL, **COMMON)
base64 = answer.data[0].b64_json
assert answer.usage.total_tokens > 0
flat = litellm.image_generation(prompt=PROMPT, size="64x64", num_inference_steps=2, seed=7, **COMMON)
assert flat.data[0].b64_json == base64

with Path(sys.argv[2]).open("rb") as file:
    edited = litellm.image_edit(image=file, prompt="Snow", **SMALL, **COMMON)
assert edited.data[0].b64_json not in {None, base64}
assert edited.usage.input_tokens_details["image_tokens"] > 0

messages = [{"role": "user", "content": PROMPT}]
chat = litellm.completion(messages=messages, modalities=["image", "text"], **SMALL, **COMMON)
(image,) = chat.choices[0].message.images
assert image["image_url"]["url"] == f"data:image/png;base64,{base64}"
assert chat.usage.total_tokens > 0
chunks = list(litellm.completion(messages=messages, modalities=["image", "text"], stream=True, **SMALL, **COMMON))
images = [image for chunk in chunks for image in getattr(chunk.choices[0].delta, "images", None) or ()]
assert [image["image_url"]["url"] for image in images] == [f"data:image/png;base64,{base64}"]

refused = None
try:
    litellm.image_generation(prompt=" ", **SMALL, **COMMON)
except litellm.BadRequestError as error:
    refused = error
assert refused is not None
assert "allowed: text with something other than white space" in str(refused)
print("done")
