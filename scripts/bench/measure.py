"""What all benchmarks share: their flags and their output, one JSON object a line. Imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_image.request.geometry import Grid, Size

REPOSITORY = Path(__file__).resolve().parents[2]
if str(REPOSITORY / "scripts") not in sys.path:
    sys.path.append(str(REPOSITORY / "scripts"))  # has capacity_planner; a script's own path is its folder

TINY_CHECKPOINT = REPOSITORY / "checkpoints" / "tiny"
PROMPT = "A red fox reading a newspaper that says 'NEWS'"
DIGITS = 4


def report(measure: str, **values: Any) -> None:
    """Prints one measure as a JSON line; floats are rounded to four decimals, or to four significant digits below 1."""
    print(json.dumps({"measure": measure, **{name: _rounded(value) for name, value in values.items()}}), flush=True)


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value, DIGITS) if abs(value) >= 1 else float(f"{value:.{DIGITS}g}")


def new_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Returns a parser that shows a description as it is."""
    return argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def engine_parser(name: str, description: str | None, size: str = "1024x1024") -> argparse.ArgumentParser:
    """Returns a parser with the flags of every benchmark of an engine."""
    parser = new_parser(name, description)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        default=TINY_CHECKPOINT,
        help="folder with model_index.json (checkpoints/tiny)",
    )
    parser.add_argument("--load-format", default="dummy", choices=("dummy", "auto"), help="dummy: random weights")
    parser.add_argument("--device", default="auto", help="(%(default)s)")
    add_size(parser, size)
    return parser


def add_size(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds ``--size``; a benchmark of one size takes the first."""
    parser.add_argument(
        "--size",
        "--sizes",
        dest="sizes",
        type=read_sizes,
        default=default,
        metavar="WIDTHxHEIGHT[,...]",
        help="of the images (%(default)s)",
    )


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, brief: Mapping[str, Any]
) -> argparse.Namespace:
    """Parses arguments; with ``--brief``, ``brief`` has the defaults of the other flags."""
    parser.add_argument("--brief", action="store_true", help=f"defaults that take seconds: {_as_flags(brief)}")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--brief" in given:
        parser.set_defaults(**brief)
    return parser.parse_args(given)


def _as_flags(values: Mapping[str, Any]) -> str:
    names = {"sizes": "size"}
    return " ".join(f"--{names.get(name, name).replace('_', '-')} {value}" for name, value in values.items())


def read_sizes(text: str) -> list[Size]:
    """Reads sizes with commas between them."""
    return [read_size(part) for part in text.split(",")]


def read_size(text: str) -> Size:
    """Reads WIDTHxHEIGHT, in pixels.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) * int(height)):
        raise argparse.ArgumentTypeError(f"size is {text!r}; allowed: WIDTHxHEIGHT, such as 1024x1024")
    return Size(int(height), int(width))


def size_name(size: Size | Grid) -> str:
    """Returns WIDTHxHEIGHT in pixels, of a grid that of its image."""
    pixels = 32 if isinstance(size, Grid) else 1
    return f"{size.width * pixels}x{size.height * pixels}"
