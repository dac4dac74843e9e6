"""Result files, and what is made of them: comparisons, plots, and the tables of docs/performance.md."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from results import BENCHMARKS, RESULTS, THIS_RUN, Result, figures, host, keyed, read, read_all, slug
from tables import BEGIN, END, TABLES, render

from benchmarks.lines import check_ceiling

FOLDER = RESULTS.parent
REPOSITORY = FOLDER.parents[1]
PROGRAMS = ("run", "compare", "plot", "render", "full_size", "several_cards.sh")
COMMAND = re.compile(r' *(?:measure|bench "[\w ]+") ([a-z]+ .*)')
PAGE = REPOSITORY / "docs" / "performance.md"


def program(name: str) -> ModuleType:
    """Imports a program that has no suffix."""
    loader = importlib.machinery.SourceFileLoader(f"bench_{name}", str(FOLDER / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def result(**changes: Any) -> Result:
    measures = [
        {"measure": "decode step", "size": 1024, "running": 1, "ms": 5.0, "to_floor": 1.25},
        {"measure": "decode step", "size": 1024, "running": 8, "ms": 6.0, "to_floor": 1.5},
    ]
    made = Result("ar", "", THIS_RUN, "2026-01-01T00:00:00+00:00", "abc1234", "GPU X1", host(), {}, [], measures)
    return replace(made, **changes)


def test_a_result_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = result(label="int8").save(tmp_path)
    assert path.name == "gpu-x1-ar-int8.json"
    assert read(path) == result(label="int8")
    path.write_text('{"benchmark": "ar"}')
    with pytest.raises(ValueError, match=r"gpu-x1-ar-int8\.json: no result of a benchmark"):
        read(path)


def test_run_saves_what_a_benchmark_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bus", "--brief", "--requests", "2", "--save", "--folder", str(tmp_path), "--commit", "abc1234"]
    assert program("run").main(arguments) == 0
    printed = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    (saved,) = read_all([tmp_path])
    assert saved.measures == printed[1:]
    check_ceiling(printed)
    assert (saved.benchmark, saved.commit, saved.source) == ("bus", "abc1234", THIS_RUN)
    assert saved.arguments == ["--brief", "--requests", "2"]
    assert saved.device == saved.host["cpu"] != ""
    assert saved.versions == printed[0]["versions"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", saved.date)


def test_a_benchmark_that_fails_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERF_ANALYZER", str(tmp_path / "none"))
    arguments = ["served", "--driver", "perf_analyzer", "--save", "--folder", str(tmp_path)]
    assert program("run").main(arguments) == 1
    assert list(tmp_path.iterdir()) == []


def test_compare_prints_the_ratio_of_each_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = result().save(tmp_path / "before")
    faster = [{**line, "ms": line["ms"] / 2} for line in result().measures]
    after = result(measures=faster[:1]).save(tmp_path / "after")
    assert program("compare").main([str(before), str(after)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "## ar",
        "decode step, size 1024, running 1: ms 5 -> 2.5 (0.500)",
        "decode step, size 1024, running 1: to_floor 1.25 -> 1.25 (1.000)",
    ]
    other = result(benchmark="dit").save(tmp_path / "other")
    assert program("compare").main([str(before), str(other)]) == 1


def test_lines_that_measure_the_same_are_kept_apart() -> None:
    line = {"measure": "answered", "seconds": 1.0}
    assert list(keyed([line, line])) == ["answered", "answered (2)"]
    assert figures({**line, "same": True, "requests": 3}) == {"seconds": 1.0}
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_plot_draws_a_bar_for_each_figure_with_a_floor(tmp_path: Path) -> None:
    picture = tmp_path / "bars.svg"
    assert program("plot").main([str(result().save(tmp_path)), "-o", str(picture)]) == 0
    root = ElementTree.parse(picture).getroot()
    names = [element.tag.rpartition("}")[2] for element in root]
    assert (names.count("rect"), names.count("line")) == (2, 1)
    assert {"1.25", "1.50"} < {element.text for element in root}
    assert program("plot").main([str(result(measures=[]).save(tmp_path)), "-o", str(picture)]) == 1


def test_the_page_has_the_figures_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert render(page) == page, "run scripts/bench/render"
    assert set(re.findall(re.escape(BEGIN).replace(r"\{\}", "(.+)"), page)) == set(TABLES)


def test_a_table_follows_its_result_files(tmp_path: Path) -> None:
    result(device="NVIDIA H200").save(tmp_path)
    page = render(f"before\n{BEGIN.format('ar')}\nold\n{END}\nafter", tmp_path)
    assert "| decode step, 8 running, 1024x1024 | 6.00 ms | 1.50 | – | – |" in page
    assert "old" not in page
    assert page.startswith("before\n")
    assert page.endswith("\nafter")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_result_files_are_complete_and_name_no_machine(path: Path) -> None:
    saved = read(path)
    assert path.name == saved.file_name
    assert saved.measures
    assert set(saved.host) <= {"cpu", "cores"}
    if saved.source == THIS_RUN:
        assert saved.date
        assert saved.commit
        assert {"python", "torch"} <= set(saved.versions)


@pytest.mark.parametrize("name", [*(f"{name}.py" for name in BENCHMARKS), *PROGRAMS])
def test_benchmarks_are_programs(name: str) -> None:
    path = FOLDER / name
    assert path.stat().st_mode & 0o111
    assert path.read_text().startswith("#!/usr/bin/env ")


@pytest.mark.parametrize("script", ["full_size", "several_cards.sh"])
def test_scripts_run_benchmarks_with_flags_that_they_have(script: str) -> None:
    matches = map(COMMAND.fullmatch, (FOLDER / script).read_text().splitlines())
    commands = [shlex.split(match[1]) for match in matches if match]
    assert len(commands) > 5
    for name, *arguments in commands:
        if "--label" in arguments:
            label = arguments.index("--label")
            del arguments[label : label + 2]
        importlib.import_module(name).parse_arguments([*arguments, "--checkpoint", "FULL"])


@pytest.mark.parametrize("script", ["full_size", "several_cards.sh"])
def test_scripts_of_many_benchmarks_need_a_folder(script: str) -> None:
    ended = subprocess.run([FOLDER / script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, "")
    assert f"{script} FOLDER [SECONDS] [COMMIT]" in ended.stdout
