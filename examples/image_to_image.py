"""Edits an image by a prompt, then combines two source images in one request."""

from PIL import Image, ImageDraw

from glm_image_client import GlmImageClient

# The image to edit.
source = Image.new("RGB", (256, 256), (150, 200, 255))
draw = ImageDraw.Draw(source)
draw.ellipse((24, 76, 108, 160), outline=(250, 215, 0), width=20)
draw.rectangle((150, 82, 228, 160), fill=(25, 55, 220))
source.save("edit_before.png")

size = {"width": 256, "height": 256}
with GlmImageClient("127.0.0.1:8001") as client:
    # Sources are paths, bytes of image files, or PIL images.
    edited = client.generate(
        "Paint the blue square red", images=["edit_before.png"], num_inference_steps=20, seed=42, **size
    )
    edited.save("edit_after.png")

    detail = source.crop((128, 56, 256, 184))
    combined = client.generate(
        "The square of the first picture in the place of the ring of the second",
        images=[detail, "edit_before.png"],
        num_inference_steps=20,
        seed=42,
        num_images=2,
        **size,
    )
combined.save("edit_two.png")  # edit_two_0.png and edit_two_1.png
print(combined.metadata.tokens)  # {'prompt': 34, 'source': 80, 'preview': 0, 'image': 64}
