"""Records a stream: pastes its images side by side, each with its time.

record_stream.py --url HOST:PORT [--size 1024x1024] [--steps 50] [-o docs/stream.png] PROMPT
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from glm_image_client import GlmImageClient, StreamEvent

SIDE, LINE, GAP = 176, 16, 6
FRAMES = 6


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="record_stream.py", description="Records the frames of one stream.")
    parser.add_argument("prompt")
    parser.add_argument("--url", metavar="HOST:PORT", help="the server's gRPC address")
    parser.add_argument("--size", default="1024x1024", metavar="WxH", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/stream.png"), help="(%(default)s)")
    return parser.parse_args()


def frame(event: StreamEvent) -> Image.Image:
    """Returns an event's image with a caption below."""
    (image,) = event.images
    label = f"{event.kind} {event.done}/{event.total}" if event.kind == "denoise" else event.kind

    scale = SIDE / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    frame_image = Image.new("RGB", (SIDE, SIDE + LINE), "white")
    frame_image.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    ImageDraw.Draw(frame_image).text((2, SIDE + 2), f"{event.seconds:.1f} s: {label}", fill="black")
    return frame_image


def main() -> None:
    flags = parse_arguments()
    width, height = (int(side) for side in flags.size.split("x"))
    options = {"width": width, "height": height, "num_inference_steps": flags.steps, "seed": flags.seed}
    with GlmImageClient(flags.url) as client:
        every = max(1, flags.steps // (FRAMES - 1))
        events = [event for event in client.stream(flags.prompt, **options, preview_every=every) if event.images]
    frames = [frame(event) for event in events]
    sheet = Image.new("RGB", (len(frames) * (SIDE + GAP) - GAP, SIDE + LINE), "white")
    for index, image in enumerate(frames):
        sheet.paste(image, (index * (SIDE + GAP), 0))
    sheet.quantize(256).save(flags.output, optimize=True)
    print(flags.output, flags.output.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
