"""Every use of torch_npu, which cannot be imported without an NPU's libraries, exists in the pinned release.

The uses of the device runtimes are read from this package's source, and looked up with their arguments in the sources
and operator schemas of the torch-npu wheel; and in the same way in those of ``torch.cuda``, which mirrors it.
"""

from __future__ import annotations

import ast
import os
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from api_sources import Definition, Sources, Use, accepts, dotted, use_of, with_parents
from glm_image.dit.fused.npu import NpuBlocks

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python_backends" / "glm_image"
OPERATORS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
OPERATOR = re.compile(r"^ *(?:- )?func: (?P<schema>(?P<name>\w+)(?:\.\w+)?\(.*\) -> .*)$", re.MULTILINE)
DOWNLOAD_SECONDS = 240
# Of the two device classes in a file, the one of the other runtime.
OTHER_CLASS = {"torch.npu": "CudaDevice", "torch.cuda": "NpuDevice"}
OTHER_FILES = {"torch.npu": set(), "torch.cuda": {PACKAGE / stage / "fused" / "npu.py" for stage in ("ar", "dit")}}
OTHER_VERSIONS = ("2.7.1", "2.14.0")
"""Of torch_npu, besides the pinned one: what vendors ship, and the newest."""


def pinned(project: str) -> str:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(rf"^{project}==([\w.]+)$", constraints, re.MULTILINE)
    return str(version)


@pytest.fixture(scope="session")
def wheel() -> zipfile.Path:
    """The pinned torch-npu."""
    return cached_wheel(pinned("torch-npu"))


def cached_wheel(version: str) -> zipfile.Path:
    """Returns a version of torch-npu from the user's cache; downloaded once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glm-image-triton" / "torch-npu"
    if not (found := sorted(cache.glob(f"torch_npu-{version}-*.whl"))):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            _download(f"torch-npu=={version}", unfinished)
            for file in Path(unfinished).glob("*.whl"):
                file.rename(cache / file.name)
        found = sorted(cache.glob(f"torch_npu-{version}-*.whl"))
    return zipfile.Path(found[0])


def _download(requirement: str, folder: str) -> None:
    machine = platform.machine() if platform.machine() == "aarch64" else "x86_64"
    which = f"--python-version 3.11 --implementation cp --abi cp311 --platform manylinux_2_28_{machine}"
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary=:all:", "-d", folder]
    try:
        subprocess.run(
            [*command, *which.split(), "--retries", "1", "--timeout", "15", "--quiet", "--disable-pip-version-check"],
            check=True,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
        )
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{requirement} cannot be downloaded: {error.stderr.strip().splitlines()[-1:]}")
    except subprocess.TimeoutExpired:
        pytest.skip(f"{requirement} cannot be downloaded within {DOWNLOAD_SECONDS} s")


class Surface:
    """The interface of a runtime: functions and classes in Python, operators by their schemas."""

    def __init__(self, root: Any, runtime: str, module: str, schemas: str = "") -> None:
        self.sources = Sources(root)
        self._runtime, self._module = runtime, module
        self._operators: dict[str, list[str]] = {}
        for found in OPERATOR.finditer(schemas):
            self._operators.setdefault(found["name"], []).append(found["schema"])

    def real(self, path: str) -> str:
        """The module path behind a name: ``torch.npu`` is registered by ``torch_npu``."""
        return path.replace(self._runtime, self._module, 1) if path.startswith(self._runtime) else path

    def fault(self, use: Use) -> str | None:
        """Returns what is wrong with a use, or None."""
        path = self.real(use.path)
        name = path.rpartition(".")[2]
        definition = self.sources.find(path)
        if definition is None and path.startswith(("torch_npu.", "torch.ops.npu.")) and name in self._operators:
            return self._operator_fault(self._operators[name], use)
        if definition is None:
            return f"{use.where}: there is no {use.path}"
        return self._call_fault(definition, use)

    def _call_fault(self, definition: Definition, use: Use) -> str | None:
        owner = self.sources.find(self.real(use.path).rpartition(".")[0])
        bound = owner is not None and isinstance(owner.node, ast.ClassDef)
        signature = self.sources.signature(definition, bound=bound)
        why = accepts(signature, use) if signature is not None and use.positional is not None else None
        return why and f"{use.where}: {use.path}: {why}"

    def _operator_fault(self, overloads: list[str], use: Use) -> str | None:
        if use.positional is None:
            return None
        faults = [accepts(schema_signature(overload), use) for overload in overloads]
        return f"{use.where}: {use.path}: {'; '.join(map(str, faults))}" if all(faults) else None


def schema_signature(schema: str) -> Signature:
    """Returns the Python signature of an operator."""
    return Signature(
        Parameter(
            argument.name,
            Parameter.KEYWORD_ONLY if argument.kwarg_only else Parameter.POSITIONAL_OR_KEYWORD,
            default=None if argument.has_default_value() else Parameter.empty,
        )
        for argument in torch._C.parse_schema(schema).arguments
    )


class Uses:
    """All uses of a runtime in a file: by its name, through ``self._runtime``, and of the objects that these return."""

    def __init__(self, file: str, text: str, runtime: str, surface: Surface) -> None:
        self._file, self._runtime, self._surface = file, runtime, surface
        tree = ast.parse(text)
        tree.body = [node for node in tree.body if getattr(node, "name", "") != OTHER_CLASS[runtime]]
        self._nodes = list(with_parents(tree))
        self._returns = {
            function.name: node.value
            for function, _ in self._nodes
            if isinstance(function, ast.FunctionDef)
            for node in ast.walk(function)
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Call)
        }
        self._handles = dict(self._handle_classes())

    def uses(self) -> Iterator[Use]:
        package = self._surface.real(self._runtime).partition(".")[0]
        for node, parent in self._nodes:
            where = f"{self._file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch_npu" == package:
                yield from (Use(f"{node.module}.{alias.name}", None, (), where) for alias in node.names)
            if isinstance(node, ast.Attribute) and not isinstance(parent, ast.Attribute):
                path = self._path(node)
                if path is not None:
                    yield use_of(path, node, parent, where)

    def _path(self, node: ast.Attribute) -> str | None:
        if isinstance(node.value, ast.Call):  # what a function of the runtime returned
            owner = self._path(node.value.func) if isinstance(node.value.func, ast.Attribute) else None
            made = owner and self._surface.sources.returned_class(self._surface.real(owner))
            return f"{made}.{node.attr}" if made else None
        name = (dotted(node) or "").replace("self._runtime.", f"{self._runtime}.")
        if name.startswith((f"{self._runtime}.", "torch_npu.", "torch.ops.npu.")):
            return name
        handle = self._handles.get(name.rpartition(".")[0].removeprefix("self.").removeprefix("_"))
        return f"{handle}.{node.attr}" if handle and node.attr.islower() else None

    def _handle_classes(self) -> Iterator[tuple[str, str]]:
        """Yields variables with the class of the runtime that they hold; a name means one thing throughout a file."""
        for node, _ in self._nodes:
            if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
                continue
            made: ast.Call = node.value
            name = dotted(made.func) or ""
            if name.startswith("self.") and isinstance(self._returns.get(name[5:]), ast.Call):
                name = dotted(self._returns[name[5:]].func) or ""  # type: ignore[attr-defined]
            if name.startswith("self._runtime."):
                path = self._surface.real(name.replace("self._runtime", self._runtime))
                if (found := self._surface.sources.returned_class(path)) is not None:
                    yield from ((target.id, found) for target in node.targets if isinstance(target, ast.Name))


def uses_of_package(runtime: str, surface: Surface) -> list[Use]:
    return [
        use
        for file in sorted(set(PACKAGE.rglob("*.py")) - OTHER_FILES[runtime])
        for use in Uses(str(file.relative_to(ROOT)), file.read_text(encoding="utf-8"), runtime, surface).uses()
    ]


@pytest.fixture(scope="session")
def npu(wheel: zipfile.Path) -> Surface:
    return npu_surface(wheel)


def npu_surface(wheel: zipfile.Path) -> Surface:
    schemas = wheel.joinpath(OPERATORS).read_text(encoding="utf-8")
    return Surface(wheel, "torch.npu", "torch_npu.npu", schemas)


@pytest.fixture(scope="session")
def cuda() -> Surface:
    return Surface(Path(torch.__file__).resolve().parents[1], "torch.cuda", "torch.cuda")


@pytest.fixture(params=["torch.npu", "torch.cuda"])
def surface(request: pytest.FixtureRequest) -> tuple[str, Surface]:
    return request.param, request.getfixturevalue(request.param.removeprefix("torch."))


# A lower bound, written by hand, so that the code above cannot silently find less.
SEEN = {
    "torch.npu": {
        "torch.npu.NPUGraph", "torch.npu.graph", "torch.npu.mem_get_info", "torch.npu.max_memory_allocated",
        "torch.npu.set_device", "torch.npu.is_available", "torch.npu.device_count",
        "torch_npu.npu.NPUGraph.replay", "torch_npu.npu.Event.synchronize",
        "torch_npu.npu.Stream.wait_stream", "torch.ops.npu.npu_weight_quant_batchmatmul",
        "torch.ops.npu.npu_rms_norm", "torch.ops.npu.npu_add_rms_norm", "torch.ops.npu.npu_rotary_mul",
        "torch.ops.npu.npu_swiglu", "torch.ops.npu.npu_gelu", "torch.ops.npu.scatter_update_",
        "torch.ops.npu.npu_fused_infer_attention_score", "torch.ops.npu.npu_fusion_attention",
        "torch.ops.npu.npu_group_norm_silu",
    },
    "torch.cuda": {
        "torch.cuda.CUDAGraph", "torch.cuda.graph", "torch.cuda.CUDAGraph.replay", "torch.cuda.Event.record",
        "torch.cuda.Stream.wait_stream",
    },
}  # fmt: skip


def test_every_use_exists_with_its_arguments(surface: tuple[str, Surface]) -> None:
    runtime, offered = surface
    uses = uses_of_package(runtime, offered)
    assert {use.path for use in uses} >= SEEN[runtime]
    assert [fault for fault in map(offered.fault, uses) if fault] == []


@pytest.mark.full
@pytest.mark.parametrize("version", OTHER_VERSIONS)
def test_every_use_exists_in_other_versions(version: str) -> None:
    offered = npu_surface(cached_wheel(version))
    assert [fault for fault in map(offered.fault, uses_of_package("torch.npu", offered)) if fault] == []


# Code, and the word that its fault must name; "" for code without a fault.
SNIPPETS = {
    "torch.npu.mem_get_info(0)": "",
    "torch.npu.memory_info(0)": "memory_info",
    "torch.npu.mem_get_info(0, 1)": "too many positional",
    "torch.npu.graph(g, auto_dispatch_capture=True, capture_error_mode='relaxed')": "",
    "torch.npu.graph(g, auto_dispatch=True)": "auto_dispatch",
    "torch.npu.graph()": "npu_graph",
    "torch.npu.NPUGraph().update(cpu_update_input=[{}])": "",
    "torch.npu.NPUGraph().update(lengths=[{}])": "cpu_update_input",
    "torch.npu.NPUGraph().replays()": "replays",
    "torch.npu.current_stream().wait_stream(s)": "",
    "torch.npu.current_stream().wait_streams(s)": "wait_streams",
    "torch.npu.Event(enable_timing=True).record()": "",
    "torch.npu.Event(timing=True)": "timing",
    "torch.npu.graphs.NPUGraph()": "",
    "torch_npu.npu_rms_norm(x, gamma, epsilon=1e-6)": "",
    "torch_npu.npu_rms_norm(x, gamma, eps=1e-6)": "eps",
    "torch_npu.npu_rms_norms(x, gamma)": "npu_rms_norms",
    "torch_npu.npu_format_cast(x, acl_format=29)": "",
    "torch_npu.npu_weight_quant_batchmatmul(x, w, antiquant_scale=s)": "",
    "torch_npu.npu_weight_quant_batchmatmul(x, w, s)": "",
    "torch_npu.npu_weight_quant_batchmatmul(x, w)": "antiquant_scale",
    "torch.ops.npu.npu_swiglu(x, dim=-1)": "",
    "torch.ops.npu.npu_swiglus(x)": "npu_swiglus",
    "from torch_npu import npu_fusion_attention": "",
    "from torch_npu import npu_fusion_attentions": "npu_fusion_attentions",
    "from torch_npu.contrib import transfer_to_npu": "",
}


@pytest.mark.parametrize("code", SNIPPETS)
def test_faults_are_found(npu: Surface, code: str) -> None:
    uses = list(Uses("code.py", code, "torch.npu", npu).uses())
    assert uses
    faults = " ".join(fault for fault in map(npu.fault, uses) if fault)
    assert SNIPPETS[code] in faults
    assert bool(faults) == bool(SNIPPETS[code])


def test_attention_has_its_name_in_diffusers() -> None:
    assert AttentionBackendName(NpuBlocks.attention_backend)


def test_pinned_version_is_that_of_torch(wheel: zipfile.Path) -> None:
    version = pinned("torch-npu")
    (info,) = [entry for entry in wheel.iterdir() if entry.name.endswith(".dist-info")]
    requires = re.findall(
        r"^Requires-Dist: torch==([\d.]+)", info.joinpath("METADATA").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [required.rstrip(".") for required in requires] == [version]
    assert pinned("torch") == version
