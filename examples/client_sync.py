"""One image with the project's client."""

from glm_image_client import GlmImageClient

with GlmImageClient("127.0.0.1:8001") as client:  # protocol="http" for port 8000
    result = client.generate(
        "A red fox reading a newspaper that says “NEWS”",
        width=256,
        height=256,
        num_inference_steps=20,
        seed=42,
    )
result.save("client.png")
print(result.images[0].size, result.seeds, result.metadata.seconds)
