"""The call of diffusers' GlmImagePipeline, with a server."""

from glm_image_client import RemotePipeline

pipe = RemotePipeline("127.0.0.1:8001")
prompt = "A red fox reading a newspaper that says “NEWS”"
images = pipe(prompt, width=256, height=256, num_inference_steps=20, num_images_per_prompt=2, generator=42).images
images[0].save("pipeline.png")
