"""The trained parts as a checkpoint folder, with its model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from make_tiny_checkpoint import PARTS, part_shapes, trained_weights, write_configs, write_json, write_weights
from train_tiny.loop import finished
from train_tiny.models import CONFIG, build_ar, build_glyph_encoder, build_transformer, build_vae, load
from train_tiny.vocabulary import merges_of

STAGES = ("vae", "vision", "painter", "editor", "writer", "reviser")


def export(run: Path) -> Path:
    """Writes ``run/checkpoint``, anew when it is there.

    Raises:
        SystemExit: a stage is not done.
    """
    folder = run / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_configs(folder, CONFIG, merges_of(run))
    _write_latent_statistics(folder / "vae" / "config.json", finished(run, "vae")["results"])
    modules = trained_modules(run)
    for part in PARTS:
        tensors = dict(modules[part.folder].named_parameters())
        write_weights(folder / part.folder, part, CONFIG, trained_weights(tensors))
    (folder / "README.md").write_text(model_card(run), encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")
    return folder


def trained_modules(run: Path) -> dict[str, nn.Module]:
    """The model's parts by their folders, with what the stages trained."""
    ar, transformer, glyphs, vae = build_ar(), build_transformer(), build_glyph_encoder(), build_vae()
    load(ar.model.visual, run, "vision", "tower.")
    load(ar.model.vqmodel, run, "vision", "quantizer.")
    load(ar.model.language_model, run, "reviser", "decoder.")
    load(ar.lm_head, run, "reviser", "head.")
    load(transformer, run, "editor", "transformer.")
    load(glyphs, run, "editor", "glyphs.")
    load(vae, run, "vae", "vae.")
    return {"vision_language_encoder": ar, "transformer": transformer, "text_encoder": glyphs, "vae": vae}


def _write_latent_statistics(file: Path, results: Mapping[str, Any]) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, config | {name: results[name] for name in ("latents_mean", "latents_std")})


def reports(run: Path, stage: str) -> list[dict[str, Any]]:
    """The lines of a stage's log."""
    return [json.loads(line) for line in (run / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines()]


def _row(run: Path, stage: str) -> str:
    lines = reports(run, stage)
    prepared = [line for line in lines if line.get("event") == "prepared"]
    samples, batches = (_each(line[name] for line in prepared) for name in ("samples", "batch"))
    end = next(line for line in reversed(lines) if line.get("event") == "end")
    losses = [line["loss"] for line in lines if "loss" in line and "event" not in line] or [float("nan")]
    known = {"stage", "event", "step", "seconds", "latents_mean", "latents_std"}
    measured = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in end.items() if name not in known)
    return (
        f"| {stage} | {samples} | {batches} | {end['step']:,} | {end['seconds']:.0f} "
        f"| {losses[0]:.4g} | {losses[-1]:.4g} | {measured} |"
    )


def _each(values: Iterable[int]) -> str:
    """Every value once, in order: a stage may have been called several times."""
    return " / ".join(f"{value:,}" for value in dict.fromkeys(values))


def _parameters() -> str:
    counts = {part.folder: sum(_count(shape) for shape in part_shapes(part, CONFIG).values()) for part in PARTS}
    rows = [f"| {folder} | {count:,} |" for folder, count in counts.items()]
    return "\n".join([*rows, f"| all | {sum(counts.values()):,} |"])


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


CARD = """\
---
license: apache-2.0
language: [en, zh]
pipeline_tag: text-to-image
---

# A tiny GLM-Image

The architecture and files of GLM-Image with a few million parameters, trained on rendered scenes of simple shapes. It
serves to try the server and to measure the cost of shortcuts. `diffusers.GlmImagePipeline` loads it unchanged.

| part | parameters |
|---|---|
{parameters}

## Contents of its images

One to three of twelve shapes in twelve colours, small or large, next to, above or inside each other; plain, graded,
striped or checked backgrounds; a sign with one word of one to six letters, quoted in the prompt, rendered as capitals.
English and Chinese. Edits of such images: another colour, position, background or word, an object added or removed.
Sizes of 128 to 512 pixels a side in steps of 32, best with no side below 256. 20 steps, guidance 1.5, temperature 1,
top-p 0.9; the published model's 0.9 and 0.75 are as good: see `docs/training.md`.

## Data

Rendered by `scripts/train_tiny/world`, without third-party images or text. One in ten combinations of shapes, colours
and relations, and one in ten words, is held out for evaluation. The letters are those of Pillow's default font. Nearly
half of the prompts are paraphrased (`paraphrase.py`).

## Training

`scripts/train_tiny`, one stage after the other (the writer needs the vision stage alone), bf16 autocast, AdamW (Muon
for the linears of attention and feed-forward in the last four), a cosine over the time given, averaged weights. The
editor goes on from the painter's weights, the reviser from the writer's.

| stage | samples | batch | steps | seconds | first loss | last loss | at the end |
|---|---|---|---|---|---|---|---|
{stages}

A batch is counted in pictures of 256x256 (the vision tower's are half that); other sizes give as many pixels or tokens.
Seconds are those of all calls of a stage, with the drawing of its samples. The first and last losses are means over a
hundred steps. "Named" is the share of cells whose shape, colour, letter or kind of background a light decoder reads
from the codes; "large grid right" how often the AR's likeliest code is the picture's, given all before it.

## How well it does what it is by_measure

{adherence}

## Limits

`docs/training.md` lists its errors, which are most frequent with a side below 256. It knows nothing beyond
its world: words for other things are noise to it, photographs as sources as well. It has no idea of people, and was
trained on nothing about them.

## Licence

Apache 2.0, as the code that made it.
"""


MEASURED = """\
By `scripts/eval/adherence.py`, on prompts and edits kept from training, 256x256, 20 steps, guidance 1.5. The same judge
finds everything right in drawings of all these scenes.\
"""


def model_card(run: Path) -> str:
    """The README of the checkpoint, its figures from the logs."""
    stages = "\n".join(_row(run, stage) for stage in STAGES)
    return CARD.format(parameters=_parameters(), stages=stages, adherence=_adherence(run))


def _adherence(run: Path) -> str:
    """The table of ``run/adherence.jsonl``, which is what ``scripts/eval/adherence.py`` prints."""
    file = run / "adherence.jsonl"
    if not file.exists():
        return "Not measured."
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    by_measure = {line["measure"]: line for line in lines}
    rows = [
        f"| {name.replace('_', ' ')} | {_share(by_measure, measure, name)} | {_share(by_measure, chance, name)} "
        f"| {by_measure[measure]['of'][name]} |"
        for measure, chance in (("pictures", "shuffled"), ("edits", "edits_shuffled"))
        for name in by_measure.get(measure, {}).get("of", {})
    ]
    head = ["| right | of its pictures | of its pictures for other prompts | pictures |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n\n" + MEASURED


def _share(by_measure: Mapping[str, Any], measure: str, name: str) -> str:
    return f"{by_measure[measure][name]:.0%}"
