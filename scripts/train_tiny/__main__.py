"""Train a tiny GLM-Image on rendered scenes, stage by stage.

    PYTHONPATH=scripts:python_backends python -m train_tiny STAGE FOLDER --minutes M

    vae       the VAE
    vision    the vision tower and its quantizer
    painter   the DiT and the glyph encoder, on images of one size; needs vae and vision
    editor    continues painter on other sizes and on edits
    writer    the AR; needs vision
    reviser   continues writer on edits as well
    all       all of these, each as early as possible, then export; --device cuda:0,cuda:1 trains two concurrently
    export    writes FOLDER/checkpoint, with its model card
    sheet     writes FOLDER/sheet.png: images for held-out prompts

A stage called again resumes where it stopped, and does nothing once it is done; ``all`` retries a failed stage once. On
a GPU a stage without progress for minutes fails. FOLDER holds the stages' weights (STAGE.pt) and logs (STAGE.jsonl).
The names of the stages seed their samples.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from train_tiny.data import Samples, sample
from train_tiny.loop import Log, Stage, expect_progress, seconds_of, train
from train_tiny.schedule import train_all
from train_tiny.vocabulary import merges_of

SAMPLES = {
    "vae": 24_000,
    "vision": 200_000,
    "painter": 150_000,
    "editor": 80_000,
    "writer": 850_000,
    "reviser": 1_200_000,
}
SHEET_SAMPLES = 18
EDITS = {"editor": 0.3, "reviser": 0.4}
"""The share of edits among the samples; the others are images with captions."""
BATCH = {"vae": 16, "vision": 256, "painter": 256, "editor": 256, "writer": 128, "reviser": 128}
"""Images of 256x256 per batch; batches of other sizes have as many pixels or tokens."""
MINUTES = {"vae": 4.5, "vision": 5.2, "painter": 7.7, "editor": 7.8, "writer": 6.7, "reviser": 7.9}
"""Each below 8, in all below 40."""


def build(name: str, samples: Sequence[Samples], folder: Path, device: torch.device, batch: int, seed: int) -> Stage:
    if name == "vae":
        from train_tiny.autoencoder import Autoencoder  # noqa: PLC0415 - sampling forks, so it precedes the libraries' threads

        return Autoencoder(samples, device, batch, seed)
    if name == "vision":
        from train_tiny.codes import Codes  # noqa: PLC0415

        return Codes(samples, device, batch, seed)
    if name in ("painter", "editor"):
        from train_tiny.painter import Editor, Painter  # noqa: PLC0415

        return (Painter if name == "painter" else Editor)(samples, folder, device, batch, seed)
    from train_tiny.writer import Reviser, Writer  # noqa: PLC0415

    return (Writer if name == "writer" else Reviser)(samples, folder, device, batch, seed)


def run_stage(name: str, arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    folder, device = arguments.folder, torch.device(arguments.device)
    log = Log(folder, name)
    minutes = MINUTES[name] if arguments.minutes is None else arguments.minutes
    if (spent := seconds_of(folder, name)) >= minutes * 60:
        log.write(event="already done", seconds=spent)
        return
    count = SAMPLES[name] if arguments.samples is None else arguments.samples
    batch = BATCH[name] if arguments.batch is None else arguments.batch
    of_edits = round(count * EDITS.get(name, 0.0))
    counts = ((count - of_edits, False), (of_edits, True))
    samples = [sample(some, f"{arguments.seed} {name}", edits=edits) for some, edits in counts if some]
    if name == "writer":
        merges_of(folder)
    torch.manual_seed(arguments.seed)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # compilation and graph capture use the current device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    # In torch 2.11 to 2.13 cuDNN's attention backward yields NaN for some lengths once scores are far below zero:
    # github.com/pytorch/pytorch/issues/196678
    torch.backends.cuda.enable_cudnn_sdp(False)
    sampled = time.monotonic() - began
    expect_progress(device)
    stage = build(name, samples, folder, device, batch, arguments.seed)
    prepared = time.monotonic() - began
    log.write(event="prepared", samples=count, batch=batch, sampled=sampled, prepared=prepared)
    train(stage, folder, minutes, arguments.seed, began)


def run_all(arguments: argparse.Namespace) -> None:
    """Trains all stages, each in a process of its own, and exports them; resumes an earlier call."""

    def train_stage(name: str, device: str) -> None:
        command = [sys.executable, "-m", "train_tiny", name, str(arguments.folder), "--device", device]
        for option in ("minutes", "samples", "batch", "seed"):
            if (value := getattr(arguments, option)) is not None:
                command += [f"--{option}", str(value)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"the stage {name} failed on {device}")

    train_all(train_stage, arguments.device.split(","))
    from train_tiny.export import export  # noqa: PLC0415

    export(arguments.folder)


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}; allowed: 1 or more")
    return number


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_tiny", description="Train a tiny GLM-Image, stage by stage.")
    parser.add_argument("stage", choices=[*SAMPLES, "all", "export", "sheet"])
    parser.add_argument("folder", type=Path, help="the run's folder: weights, logs, checkpoint")
    parser.add_argument("--minutes", type=float, help="per stage, over all calls (default: each stage's own)")
    parser.add_argument("--samples", type=positive, help="number of scenes and edits")
    parser.add_argument("--batch", type=positive, help="images of 256x256 per batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "export":
        from train_tiny.export import export  # noqa: PLC0415

        export(arguments.folder)
    elif arguments.stage == "sheet":
        from train_tiny.samples import sample_sheet  # noqa: PLC0415

        device = "cuda:0" if arguments.device == "cuda" else arguments.device
        count = SHEET_SAMPLES if arguments.samples is None else arguments.samples
        sample_sheet(arguments.folder / "checkpoint", arguments.folder / "sheet.png", device, count)
    elif arguments.stage == "all":
        run_all(arguments)
    else:
        run_stage(arguments.stage, arguments)


if __name__ == "__main__":
    main()
