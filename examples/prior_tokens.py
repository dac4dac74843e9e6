"""Keeps the image tokens of the first stage, renders them at several settings, edits them and renders again."""

from dataclasses import replace

import numpy as np
from PIL import Image

from glm_image_client import GlmImageClient, PriorTokens

prompt = "A red fox reading a newspaper that says “NEWS”"
client = GlmImageClient("127.0.0.1:8001")

# Generate the tokens once and keep them.
prior = client.prior_tokens(prompt, width=256, height=256, seed=42)
prior.save("fox.npz")
client.paint(prompt, prior, num_inference_steps=20).save("kept.png")
print(prior.prior_grid, prior.prior_token_ids.shape)  # [8 8] (1, 64)

# Render them with other seeds, steps and guidance scales.
prior = PriorTokens.load("fox.npz")
settings = [
    {"seed": 42, "num_inference_steps": 20, "guidance_scale": 1.5},
    {"seed": 43, "num_inference_steps": 20, "guidance_scale": 1.5},
    {"seed": 44, "num_inference_steps": 20, "guidance_scale": 1.5},
    {"seed": 42, "num_inference_steps": 5, "guidance_scale": 1.5},
    {"seed": 42, "num_inference_steps": 20, "guidance_scale": 1.0},
    {"seed": 42, "num_inference_steps": 20, "guidance_scale": 4.0},
]
sheet = Image.new("RGB", (3 * 256, 2 * 256))
for index, setting in enumerate(settings):
    rendered = client.paint(prompt, prior, **setting)
    sheet.paste(rendered.images[0], (index % 3 * 256, index // 3 * 256))
sheet.save("variants.png")

# Edit them and render again.
rows, columns = prior.prior_grid
tokens = prior.prior_token_ids.reshape(rows, columns)
swapped = np.roll(tokens, columns // 2, axis=1)  # exchange the left and the right half

snow = client.prior_tokens("A meadow under snow", width=256, height=256, seed=7)
mixed = tokens.copy()
mixed[rows // 2 :] = snow.prior_token_ids.reshape(rows, columns)[rows // 2 :]  # lower half of another image

edited = replace(prior, prior_token_ids=np.stack([swapped, mixed]).reshape(2, -1))
client.paint(prompt, edited, num_inference_steps=20).save("edited.png")  # edited_0.png and edited_1.png
client.close()
