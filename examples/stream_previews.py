"""Progress, previews and the final image of one request, as they become available."""

from pathlib import Path

from glm_image_client import GlmImageClient

prompt = "A red fox reading a newspaper that says “NEWS”"
with GlmImageClient("127.0.0.1:8001") as client:
    for event in client.stream(prompt, width=256, height=256, num_inference_steps=20, seed=42, preview_every=5):
        print(f"{event.seconds:.1f} s {event.stage} {event.done}/{event.total}, eta {event.eta}")
        for file in event.files:  # PNG: a preview, or the state of the denoising
            Path(f"{event.kind}_{event.done:02}.png").write_bytes(file)
event.result.save("streamed.png")
