"""Calls of LangChain against a gateway; a program for an environment of its own: langchain_calls.py URL."""

from __future__ import annotations

import base64
import sys
import urllib.request

from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper
from langchain_openai import ChatOpenAI

URL = f"{sys.argv[1]}/v1"
PNG = b"\x89PNG"

wrapper = DallEAPIWrapper(model="dall-e-2", n=2, size="32x32", quality="low", base_url=URL, api_key="none")
urls = wrapper.run("A red fox").split(wrapper.separator)
assert len(urls) == 2
for url in urls:
    with urllib.request.urlopen(url) as answer:
        assert answer.read().startswith(PNG)

own = {"size": "64x64", "num_inference_steps": 2, "seed": 7}
chat = ChatOpenAI(model="glm-image", base_url=URL, api_key="none", extra_body=own)
message = chat.invoke("A red fox")
content = message.content[0]["image_url"]["url"]
assert base64.b64decode(content.partition(",")[2]).startswith(PNG)
assert message.usage_metadata["total_tokens"] > 0
streamed = [part for chunk in chat.stream("A red fox") if isinstance(chunk.content, list) for part in chunk.content]
assert [part["image_url"]["url"] for part in streamed] == [content]
print("done")
