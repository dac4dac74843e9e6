"""Train a tiny GLM-Image on a small world, stage by stage.

    PYTHONPATH=scripts:python_backends python -m train_tiny STAGE FOLDER --minutes M

    vae       the VAE
    vision    the vision tower and its quantizer
    painter   the DiT and the glyph encoder, on pictures of one size; needs vae and vision
    editor    both further, on every size and on edits; needs painter
    writer    the AR; needs vision
    export    the checkpoint: FOLDER/checkpoint, with its model card
    sheet     pictures for prompts it was not trained on: FOLDER/sheet.png

A stage called again goes on where it stopped, and does nothing once it is done. FOLDER holds its weights (STAGE.pt) and
its log (STAGE.jsonl).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from train_tiny.data import Samples, sample
from train_tiny.loop import Log, Stage, seconds_of, train
from train_tiny.vocabulary import merges_of

SHARES = {"vae": (1.0, 0.0), "vision": (1.0, 0.0), "painter": (1.0, 0.0), "editor": (0.7, 0.3), "writer": (0.67, 0.33)}
"""Of the samples: pictures with captions, and edits."""
SAMPLES = {"vae": 24_000, "vision": 200_000, "painter": 150_000, "editor": 70_000, "writer": 1_000_000}
BATCH = {"vae": 16, "vision": 256, "painter": 256, "editor": 256, "writer": 128}
"""Pictures of 256x256 at once; of other sizes as many as give as many pixels or tokens."""


def build(name: str, samples: Sequence[Samples], folder: Path, device: torch.device, batch: int, seed: int) -> Stage:
    if name == "vae":
        from train_tiny.autoencoder import Autoencoder  # noqa: PLC0415 - samples come before the libraries' threads

        return Autoencoder(samples, device, batch, seed)
    if name == "vision":
        from train_tiny.codes import Codes  # noqa: PLC0415

        return Codes(samples, device, batch, seed)
    if name in ("painter", "editor"):
        from train_tiny.painter import Editor, Painter  # noqa: PLC0415

        return (Painter if name == "painter" else Editor)(samples, folder, device, batch, seed)
    from train_tiny.writer import Writer  # noqa: PLC0415

    return Writer(samples, folder, device, batch, seed)


def run_stage(name: str, arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    folder, device = arguments.folder, torch.device(arguments.device)
    log = Log(folder, name)
    if (spent := seconds_of(folder, name)) >= arguments.minutes * 60:
        log.write(event="already done", seconds=spent)
        return
    count, batch = arguments.samples or SAMPLES[name], arguments.batch or BATCH[name]
    counts = zip((round(count * share) for share in SHARES[name]), (False, True), strict=True)
    samples = [sample(some, arguments.seed, edits=edits) for some, edits in counts if some]
    if name == "writer":
        merges_of(folder)
    torch.manual_seed(arguments.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    # cuDNN's backward of attention gives NaN for some lengths once scores are far below zero, as of torch 2.11 to 2.13:
    # github.com/pytorch/pytorch/issues/196678
    torch.backends.cuda.enable_cudnn_sdp(False)
    sampled = time.monotonic() - began
    stage = build(name, samples, folder, device, batch, arguments.seed)
    prepared = time.monotonic() - began
    log.write(event="prepared", samples=count, batch=batch, sampled=sampled, prepared=prepared)
    train(stage, folder, arguments.minutes, arguments.seed, began)


def main() -> None:
    parser = argparse.ArgumentParser(prog="train_tiny", description="Train a tiny GLM-Image, stage by stage.")
    parser.add_argument("stage", choices=[*SAMPLES, "export", "sheet"])
    parser.add_argument("folder", type=Path, help="of the run: weights, logs, the checkpoint")
    parser.add_argument("--minutes", type=float, default=2.0, help="the stage's, in all calls together")
    parser.add_argument("--samples", type=int, help="scenes and edits to learn from")
    parser.add_argument("--batch", type=int, help="pictures of 256x256 at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "export":
        from train_tiny.export import export  # noqa: PLC0415

        export(arguments.folder)
    elif arguments.stage == "sheet":
        from train_tiny.samples import sample_sheet  # noqa: PLC0415

        device = "cuda:0" if arguments.device == "cuda" else arguments.device
        sample_sheet(arguments.folder / "checkpoint", arguments.folder / "sheet.png", device, arguments.samples or 18)
    else:
        run_stage(arguments.stage, arguments)


if __name__ == "__main__":
    main()
