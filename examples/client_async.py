"""Two requests in flight with the asyncio client; the server decodes them in one batch."""

import asyncio

from glm_image_client import AsyncGlmImageClient, Retries


async def main() -> None:
    prompts = ["A red fox reading a newspaper that says “NEWS”", "A meadow under snow"]
    async with AsyncGlmImageClient("127.0.0.1:8001", timeout=600, retries=Retries()) as client:
        results = await asyncio.gather(
            *(client.generate(prompt, width=256, height=256, num_inference_steps=20, seed=42) for prompt in prompts)
        )
    for index, result in enumerate(results):
        result.save(f"async_{index}.png")


asyncio.run(main())
