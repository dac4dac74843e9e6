"""Measures each shortcut's cost in quality and gain in time, with equal prompts and seeds; prints JSON lines.

    shortcuts.py --checkpoint DIR [--only exact,cache-0.24] [-n 100] [--edits 24] [--markdown]

Each line: adherence per property, PSNR and SSIM against the exact pictures of the same seeds, the median seconds a
picture. ``--markdown`` prints the table besides. What several devices share takes those that follow ``--device``. A
shortcut that this build or device does not have says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from eval.adherence import add_request_arguments, judge_question, measure, request_of, say, shares
from eval.questions import Picture, Question, Request, edit_questions, local_generator, scene_questions
from eval.similarity import psnr, ssim
from glm_image.devices.open import instance_device
from glm_image.errors import ConfigurationError
from glm_image.pipeline import LocalSettings


@dataclass(frozen=True)
class Shortcut:
    """Settings that trade quality for time.

    Attributes:
        ar: fields of ``ArSettings``.
        dit: fields of ``DitSettings``.
        cache: fields of ``CacheSettings``; None = no cached denoising.
        steps_share: the share of the requested steps.
        devices: how many share the second stage.
    """

    ar: Mapping[str, Any] = field(default_factory=dict)
    dit: Mapping[str, Any] = field(default_factory=dict)
    cache: Mapping[str, Any] | None = None
    steps_share: float = 1.0
    devices: int = 1

    def settings(self) -> LocalSettings:
        """Returns the engines' settings.

        Raises:
            ConfigurationError: this build has no such setting.
        """
        dit = dict(self.dit)
        if self.cache is not None:
            dit["cache"] = _changed(_cache_settings()(), self.cache)
        exact = LocalSettings()
        return dataclasses.replace(exact, ar=_changed(exact.ar, self.ar), dit=_changed(exact.dit, dit))


SHORTCUTS: Final[dict[str, Shortcut]] = {
    "exact": Shortcut(),
    "cache-0.08": Shortcut(cache={"residual_diff_threshold": 0.08}),
    "cache-0.16": Shortcut(cache={"residual_diff_threshold": 0.16}),
    "cache-0.24": Shortcut(cache={"residual_diff_threshold": 0.24}),
    "cache-0.40": Shortcut(cache={"residual_diff_threshold": 0.40}),
    "steps-3/4": Shortcut(steps_share=0.75),
    "steps-1/2": Shortcut(steps_share=0.5),
    "steps-1/4": Shortcut(steps_share=0.25),
    "int8-ar": Shortcut(ar={"quantization": "int8"}),
    "int8-dit": Shortcut(dit={"quantization": "int8"}),
    "fp8-dit": Shortcut(dit={"quantization": "fp8"}),
    "int8-both": Shortcut(ar={"quantization": "int8"}, dit={"quantization": "int8"}),
    "int8-both-cache-0.24": Shortcut(
        {"quantization": "int8"}, {"quantization": "int8"}, {"residual_diff_threshold": 0.24}
    ),
    "cfg-2": Shortcut(dit={"parallel": "cfg=2"}, devices=2),
    "ulysses-2": Shortcut(dit={"parallel": "ulysses=2"}, devices=2),
    "ring-2": Shortcut(dit={"parallel": "ring=2"}, devices=2),
    "tp-2": Shortcut(dit={"parallel": "tp=2"}, devices=2),
}
"""By their names in ``--only``; the others are compared with the first."""
EXACT: Final = next(iter(SHORTCUTS))
COLUMNS: Final = (
    "colour",
    "shape",
    "position",
    "background",
    "short_word",
    "changed",
    "kept",
    "psnr",
    "ssim",
    "seconds",
)


def _cache_settings() -> type:
    try:
        cache: type = importlib.import_module("glm_image.dit.cache").CacheSettings
    except ImportError as error:
        raise ConfigurationError(f"cache: not there: {error}") from error
    return cache


def _changed(settings: Any, values: Mapping[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(settings)}
    if unknown := sorted(set(values) - known):
        raise ConfigurationError(f"{type(settings).__name__} has no {', '.join(unknown)}")
    return dataclasses.replace(settings, **values)


def devices_from(first: str, count: int) -> str:
    """Returns ``count`` consecutive devices from the first; on the CPU, as many processes."""
    kind, _, index = instance_device(first, 0).partition(":")
    return ",".join(f"{kind}:{int(index) + offset}" if index else kind for offset in range(count))


def measure_shortcut(
    shortcut: Shortcut, checkpoint: Path, device: str, questions: list[Question], request: Request
) -> tuple[list[Picture], dict[str, Any]]:
    """Generates every question's image with a shortcut; returns the images, adherence and seconds."""
    request = dataclasses.replace(request, steps=max(1, round(request.steps * shortcut.steps_share)))
    started = time.perf_counter()
    devices = devices_from(device, shortcut.devices)
    with local_generator(checkpoint, devices, shortcut.settings()) as generator:
        loaded = time.perf_counter() - started
        generator(questions[0], request)  # the first image of a size selects kernels and captures graphs
        pictures, seen, seconds = measure(generator, questions, request)
    verdicts = [judge_question(contents, question) for contents, question in zip(seen, questions, strict=True)]
    values = {"steps": request.steps, "seconds": round(seconds, 4), "load_seconds": round(loaded, 2)}
    return pictures, values | shares(verdicts)


def nearness(pictures: list[Picture], exact: list[Picture]) -> dict[str, float]:
    """Returns the mean PSNR and SSIM over pairs of images."""
    pairs = list(zip(pictures, exact, strict=True))
    return {
        "psnr": round(float(np.mean([psnr(*pair) for pair in pairs])), 2),
        "ssim": round(float(np.mean([ssim(*pair) for pair in pairs])), 4),
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the results as a Markdown table."""
    lines = [" | ".join(["shortcut", *COLUMNS]), " | ".join(["---"] * (1 + len(COLUMNS)))]
    lines += [" | ".join([name, *(str(row.get(column, "–")) for column in COLUMNS)]) for name, row in rows.items()]
    return "\n".join(f"| {line} |" for line in lines)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="shortcuts.py", description="Measures the quality of every shortcut.")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", required=True)
    parser.add_argument("--only", default=",".join(SHORTCUTS), help="comma-separated names (default: %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print a table at the end")
    add_request_arguments(parser)
    flags = parser.parse_args(arguments)
    flags.only = [EXACT, *(name for name in flags.only.split(",") if name != EXACT)]
    if unknown := [name for name in flags.only if name not in SHORTCUTS]:
        parser.error(f"--only is {unknown[0]!r}; allowed: {', '.join(SHORTCUTS)}")
    return flags


def main() -> None:
    flags = parse_arguments()
    questions = scene_questions(flags.n, flags.seed) + edit_questions(flags.edits, flags.seed)
    rows: dict[str, dict[str, Any]] = {}
    exact: list[Picture] = []
    for name in flags.only:
        try:
            pictures, values = measure_shortcut(
                SHORTCUTS[name], flags.checkpoint, flags.device, questions, request_of(flags)
            )
        except ConfigurationError as error:
            say("shortcut", name=name, unavailable=str(error))
            continue
        exact = exact or pictures
        rows[name] = values | nearness(pictures, exact)
        say("shortcut", name=name, **rows[name])
    if flags.markdown:
        print(table(rows))


if __name__ == "__main__":
    main()
