"""The tables of docs/performance.md: which figure of which result file is in which row.

Needs the standard library alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from results import RESULTS, Line, Result, read

H200: Final = "nvidia-h200"
H100: Final = "nvidia-h100-80gb-hbm3"
MISSING: Final = "–"
BEGIN: Final = "<!-- BEGIN GENERATED: {} -->"
END: Final = "<!-- END GENERATED -->"
PICTURE: Final = "picture, 50 steps, guidance 1.5"
CACHED: Final = "cached picture, 50 steps, guidance 1.5, every step that may be"


@dataclass(frozen=True)
class Column:
    """The results of a device, or of other software on it.

    Attributes:
        title: the column's.
        device: the device's part of the file names.
        run: the result file of all rows; None = the one that the row names.
    """

    title: str
    device: str
    run: str | None = None


@dataclass(frozen=True)
class Row:
    """A figure.

    Attributes:
        text: what it is.
        run: the benchmark and label: a part of the file names.
        show: a format of the line's fields.
        measure: the line's measure.
        fields: values of the line's fields.
    """

    text: str
    run: str
    show: str
    measure: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table; with ``floors`` each column has a second one, the ratio to the floor."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    floors: bool = False


BOTH: Final = (Column("H200", H200), Column("H100", H100))
COMPARED: Final = (
    Column("this project, H200", H200),
    Column("vLLM-Omni 0.26, H200", H200, "vllm-omni"),
    Column("vLLM-Omni compiled, H200", H200, "vllm-omni-compiled"),
    Column("this project, H100", H100),
    Column("diffusers 0.42, transformers 5.17, H100", H100, "diffusers"),
)
STEP, REQUEST, VAE = "decode step", "request of the AR engine", "vae decode"
FUSED: Final = "channels last, fused norms"
ESTIMATE: Final = "an estimate, on the engine's thread"
STEP_ONE: Final = {"size": 1024, "running": 1}


def _steps() -> Iterator[Row]:
    for text, fields in (
        ("decode step, 1 of 8 slots running, 1024x1024", STEP_ONE),
        ("decode step, 8 running, 1024x1024", {"size": 1024, "running": 8}),
        ("decode step, 8 running, near the end of 2048x2048", {"size": 2048, "running": 8}),
    ):
        yield Row(text, "ar", "{ms:.2f} ms", STEP, fields)


def _kernels() -> Iterator[Row]:
    for name in ("gate_up", "down", "qkv", "out", "head"):
        show = "{us:.0f} µs, {gb_s:.0f} GB/s"
        yield Row(f"`{name}`, bf16", "ar", show, "kernel", {"name": name})
        yield Row(f"`{name}`, int8", "ar-int8", show, "kernel", {"name": name})


def _vae() -> Iterator[Row]:
    for variant in ("plain", "channels last", FUSED, "in tiles"):
        for size in ("1024x1024", "2048x2048"):
            fields = {"variant": variant, "size": size}
            yield Row(f"{variant}, {size}", "vae", "{seconds:.3f} s, works in {working_gb:.1f} GB", VAE, fields)


def _products() -> Iterator[Row]:
    for layer in ("qkv", "out", "up", "down"):
        for function in ("bf16", "fp8, a scale a row"):
            fields = {"layer": layer, "function": function}
            yield Row(f"`{layer}`, {function}", "quantized", "{tflop_s:.0f} TFLOP/s", "product", fields)


def _source_steps() -> Iterator[Row]:
    for guidance in (1.0, 1.5):
        for sources in (0, 1, 2):
            text = f"denoising step, guidance {guidance}, {sources} source images"
            yield Row(text, "i2i", "{ms:.1f} ms", "step", {"sources": sources, "guidance": guidance})


TABLES: Final = {
    "compared": Table(
        "1024x1024, 50 steps, guidance 1.5",
        COMPARED,
        (
            Row("AR, a token, 1 sequence", "ar", "{ms:.2f} ms", STEP, STEP_ONE),
            Row("DiT, 50 steps", "dit", "{denoise_seconds:.2f} s", PICTURE, {"size": "1024x1024"}),
            Row("VAE", "vae", "{seconds:.3f} s", VAE, {"size": "1024x1024", "variant": FUSED}),
            Row("one request, served", "served", "{p50_seconds:.1f} s", "load", {"concurrency": 1}),
            Row("four requests together, served", "served", "{p99_seconds:.1f} s", "load", {"concurrency": 4}),
            Row("start to ready", "served", "{seconds:.1f} s", "start to ready"),
        ),
    ),
    "ar": Table(
        "AR",
        BOTH,
        (
            *_steps(),
            Row("decode step, int8 weights, 1 running", "ar-int8", "{ms:.2f} ms", STEP, STEP_ONE),
            Row("the first request after load, 1024x1024", "ar", "{seconds:.2f} s", REQUEST, {"which": "first"}),
            Row("the second", "ar", "{seconds:.2f} s", REQUEST, {"which": "second"}),
            Row("eight requests together", "ar", "{seconds:.2f} s", REQUEST, {"which": "eight together"}),
            Row("the host's work in a step", "ar", "{ms:.2f} ms", "host time of a step"),
            Row("admission of a 64-token prompt", "ar", "{lost_ms:.0f} ms", "admission of a 64-token prompt"),
            Row("memory at its peak", "ar", "{peak_gb:.1f} GB", "memory"),
            Row("int8 weights: error of the logits", "ar-int8", "{logit_error:.3f}", "int8 weights"),
        ),
        floors=True,
    ),
    "ar-kernels": Table("Linear layers of a decode step, 8 running, all layers", BOTH, tuple(_kernels())),
    "dit": Table(
        "DiT",
        BOTH,
        (
            *(
                Row(f"{size}, 50 steps", "dit", "{denoise_seconds:.2f} s", PICTURE, {"size": size})
                for size in ("1024x1024", "1920x1024", "2048x2048")
            ),
            Row("1024x1024, fp8", "dit-fp8", "{denoise_seconds:.2f} s", PICTURE, {"size": "1024x1024"}),
            Row("1024x1024, int8", "dit-int8", "{denoise_seconds:.2f} s", PICTURE, {"size": "1024x1024"}),
            Row("1024x1024, 35 of 50 steps cached", "dit", "{denoise_seconds:.2f} s", CACHED, {"size": "1024x1024"}),
            Row("the host's work in a step", "dit", "{ms:.1f} ms of {step_ms:.0f} ms", "host time of a step"),
            Row("blocks, relative error to fp32", "dit", "{ours_to_fp32:.4f}", "difference of the blocks"),
            Row("blocks of diffusers, likewise", "dit", "{diffusers_to_fp32:.4f}", "difference of the blocks"),
        ),
        floors=True,
    ),
    "quantized": Table("Products of a block", BOTH, tuple(_products())),
    "vae": Table("VAE decode", BOTH, tuple(_vae())),
    "i2i": Table(
        "1024x1024, source images of the same size",
        BOTH,
        (
            *(
                Row(
                    f"vision tower and quantizer, {sources} source images",
                    "i2i",
                    "{ms:.0f} ms",
                    "vision tower and quantizer",
                    {"sources": sources},
                )
                for sources in (1, 2, 4)
            ),
            Row("conditions of one source image", "i2i", "{seconds:.2f} s", "condition, one source"),
            Row("its keys and values", "i2i", "{keys_and_values_gb:.2f} GB", "condition, one source"),
            *_source_steps(),
        ),
    ),
    "watched": Table(
        "Events, previews and cancelling",
        BOTH,
        (
            Row(
                "a latent preview, against the step",
                "previews",
                "{percent_of_step:.1f} %",
                "an estimate, on the engine's thread",
            ),
            Row("a preview (512x512, 6 steps)", "previews", "{seconds:.2f} s", "a preview, alone"),
            Row(
                "cancelled to free slot, worst",
                "cancel",
                "{worst_ms:.1f} ms, {worst_steps:.1f} steps",
                "cancel to free slot",
            ),
            Row("cancelled to free DiT, worst", "cancel", "{worst_ms:.0f} ms", "cancel to free device"),
            Row("cancelled to answered, queued", "cancel", "{worst_ms:.1f} ms", "cancel to answer in the queue"),
        ),
    ),
    "parallel": Table(
        "Two devices, against one of the same run",
        (Column("two H100", f"{H100}-x2"),),
        (
            *(
                Row(
                    f"decode step, 8 running, {through}",
                    "parallel",
                    "{ms:.2f} ms, {speedup:.2f} x",
                    STEP,
                    {"devices": 2, "through": through},
                )
                for through in ("memory of the peers", "collectives")
            ),
            *(
                Row(
                    f"denoising step, `{parallel}`, {size}",
                    "parallel",
                    "{ms:.1f} ms, {speedup:.2f} x",
                    "denoising step",
                    {"parallel": parallel, "size": size},
                )
                for parallel in ("cfg=2", "ulysses=2", "ring=2", "tp=2")
                for size in ("1024x1024", "2048x2048")
            ),
            Row("two DiT instances, 10 steps, throughput", "cards", "{speedup:.2f} x", "several instances"),
        ),
    ),
}
"""By the name in the page's markers."""


def render(page: str, folder: Path = RESULTS) -> str:
    """Returns the page with the tables between its markers rendered from the result files of a folder.

    Raises:
        KeyError: a marker names no table.
    """
    found = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    pattern = re.compile(re.escape(BEGIN).replace(r"\{\}", "([a-z0-9-]+)") + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda match: _block(match[1], found), page)


def _block(name: str, found: Mapping[str, Result]) -> str:
    rows = "\n".join(_lines(TABLES[name], found))
    return f"{BEGIN.format(name)}\n\n{rows}\n\n{END}"


def _lines(table: Table, found: Mapping[str, Result]) -> Iterator[str]:
    columns = [title for column in table.columns for title in [column.title, *["to its floor"] * table.floors]]
    yield f"| {table.title} | {' | '.join(columns)} |"
    yield f"|---|{'---|' * len(columns)}"
    for row in table.rows:
        lines = [_line(row, column, found) for column in table.columns]
        if any(lines):
            cells = [text for line in lines for text in _cells(row, line, table.floors)]
            yield f"| {row.text} | {' | '.join(cells)} |"


def _line(row: Row, column: Column, found: Mapping[str, Result]) -> Line | None:
    result = found.get(f"{column.device}-{column.run or row.run}")
    return next(result.find(row.measure, **row.fields), None) if result else None


def _cells(row: Row, line: Line | None, floors: bool) -> Iterator[str]:
    if line is None:
        yield from [MISSING] * (1 + floors)
        return
    yield row.show.format_map(_Known(line))
    if floors:
        yield f"{line['to_floor']:.2f}" if "to_floor" in line else ""


class _Known(dict[str, Any]):
    """Fields of a line; a result that was not measured in this format may lack some."""

    def __missing__(self, name: str) -> Any:
        return _Unknown()


class _Unknown:
    def __format__(self, spec: str) -> str:
        return MISSING
