"""OpenAI's Python library: an image, a stream of intermediate images, and an edit."""

import base64
from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="none")
prompt = "A red fox reading a newspaper that says “NEWS”"
options = {"num_inference_steps": 20, "seed": 42}

response = client.images.generate(model="glm-image", prompt=prompt, size="256x256", extra_body=options)
Path("openai.png").write_bytes(base64.b64decode(response.data[0].b64_json))

stream = client.images.generate(
    model="glm-image", prompt=prompt, size="256x256", stream=True, partial_images=2, extra_body=options
)
for event in stream:
    name = "streamed" if event.type.endswith(".completed") else f"partial_{event.partial_image_index}"
    Path(f"openai_{name}.png").write_bytes(base64.b64decode(event.b64_json))

with Path("openai.png").open("rb") as source:
    edited = client.images.edit(model="glm-image", image=source, prompt="Make it winter", extra_body=options)
Path("openai_edit.png").write_bytes(base64.b64decode(edited.data[0].b64_json))

chat = client.chat.completions.create(
    model="glm-image",
    messages=[{"role": "user", "content": prompt}],
    extra_body={"width": 256, "height": 256, **options},
)
# The library leaves the items of the content as dictionaries.
url = chat.choices[0].message.content[0]["image_url"]["url"]
Path("openai_chat.png").write_bytes(base64.b64decode(url.partition(",")[2]))
