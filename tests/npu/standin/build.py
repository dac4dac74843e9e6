"""Compiles the stand-in for CANN, once for each state of its sources, of torch and of torch_npu.

All of it is one shared object; CANN's library names (libascendcl.so, libopapi.so, ...) are links to it, so that the
loader maps it once. Every other name that torch_npu links or looks up becomes a function that ends the process with
its name.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARIES = [
    "acl_op_compiler",
    "acl_tdt_channel",
    "aclnn_fft",
    "aclnn_math",
    "aclnn_ops_infer",
    "aclnn_ops_train",
    "aclnn_rand",
    "aclnn_sparse",
    "ascendcl",
    "atb",
    "ge_runner",
    "graph",
    "hccl",
    "nnopbase",
    "opapi",
    "runtime",
]
# Files that are compiled together, since torch's headers take longer than they do; two units for two cores.
UNITS = (("descriptors", "elementwise"), ("indexing", "model"), ("hccl",), ("streams",), ("runtime",))
# Looked up to learn whether CANN has a feature; absent, so the feature is not used.
ABSENT = {
    "aclnnNpuFormatCast",
    "aclnnNpuFormatCastCalculateSizeAndFormat",
    "aclnnReselectStaticKernel",
    "aclnnTopkV2",
    "aclnnTopkV2GetWorkspaceSize",
    "aclrtValueWait",
    "aclrtValueWrite",
}
# Unresolved in torch_npu, but not CANN's.
FOREIGN = re.compile(r"(Py|_Py|_ITM|__|dl|pthread|_ZTH)")
LOOKED_UP = re.compile(rb"(?<![\w])(?:acl(?:nn|rt|mdl|op|sk|sys)?|Hccl|Hcom)[A-Za-z0-9_]+(?=\0)")


class NoCompilerError(RuntimeError):
    """This machine has no g++."""


def build(cache: Path, torch: Path, torch_npu: Path) -> Path:
    """Returns the folder of the stand-in's libraries, below ``cache``.

    ``torch`` and ``torch_npu`` are the folders of the packages.

    Raises:
        NoCompilerError: g++ or nm is missing, and the libraries are not in the cache.
    """
    sources = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.hpp"), Path(__file__)])
    built = cache / _fingerprint(sources, torch, torch_npu)
    if built.exists():
        return built
    for tool in ("g++", "nm"):
        if shutil.which(tool) is None:
            raise NoCompilerError(f"no compiler: {tool} is not on PATH")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=cache) as unfinished:
                _compile(Path(unfinished), torch, torch_npu)
                Path(unfinished, "objects").rename(built)
    return built


def _fingerprint(sources: Iterable[Path], torch: Path, torch_npu: Path) -> str:
    parts = hashlib.sha256()
    for source in sources:
        parts.update(source.name.encode() + b"\0" + source.read_bytes())
    for package in (torch, torch_npu):
        parts.update(str(package).encode() + (package / "version.py").read_bytes())
    return parts.hexdigest()[:16]


def _compile(folder: Path, torch: Path, torch_npu: Path) -> None:
    objects = folder / "objects"
    objects.mkdir()
    headers = torch_npu / "include"  # CANN's, as the wheel has them: the compiler checks our signatures against them
    vendored = headers / "third_party"
    includes = [SOURCES, torch / "include", headers, vendored / "acl" / "inc", vendored / "hccl" / "inc"]

    def compiled(sources: tuple[str, ...]) -> Path:
        content = [*(SOURCES / f"{source}.cpp" for source in sources), *sorted(SOURCES.glob("*.hpp"))]
        target = folder.parent / f"{_fingerprint(content, torch, torch_npu)}.o"
        if target.exists():
            return target
        unit, unfinished = folder / f"unit-{sources[0]}.cpp", folder / f"{sources[0]}.o"
        unit.write_text("".join(f'#include "{source}.cpp"\n' for source in sources), encoding="utf-8")
        # Without optimization: the work is torch's, and the compiler takes half the time.
        flags = ["-std=c++20", "-O0", "-w", "-fPIC", "-fmax-errors=5", *(f"-I{path}" for path in includes)]
        subprocess.run(["g++", *flags, "-c", unit, "-o", unfinished], check=True)
        return unfinished.rename(target)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        needed = threads.submit(_needed, torch, torch_npu)
        parts = list(threads.map(compiled, UNITS))
    missing = sorted(needed.result() - _defined(parts) - ABSENT)
    stubs = folder / "missing.c"
    lines = [f'void* {name}(void) {{ standin_missing("{name}"); return 0; }}' for name in missing]
    stubs.write_text("\n".join(["void standin_missing(const char*);", *lines, ""]), encoding="utf-8")
    parts.append(stubs.with_suffix(".o"))
    subprocess.run(["gcc", "-w", "-O0", "-fPIC", "-c", stubs, "-o", parts[-1]], check=True)
    whole = objects / "libcann_standin.so"
    libraries = [
        f"-L{torch / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
        f"-Wl,-rpath,{torch / 'lib'}",
        f"-Wl,-soname,{whole.name}",
    ]
    subprocess.run(["g++", "-shared", *parts, "-o", whole, *libraries], check=True)
    for name in LIBRARIES:
        (objects / f"lib{name}.so").symlink_to(whole.name)


def _names(which: str, path: Path) -> set[str]:
    listed = subprocess.run(["nm", which, path], check=True, capture_output=True, text=True)
    return {line.split()[-1] for line in listed.stdout.splitlines() if line.strip()}


def _defined(parts: list[Path]) -> set[str]:
    return set().union(*(_names("--defined-only", part) for part in parts))


def _needed(torch: Path, torch_npu: Path) -> set[str]:
    """Returns the names that torch_npu links and no other library defines, and those that it looks up by name."""
    own = [path for path in torch_npu.rglob("*.so*") if "torchair" not in path.parts and not path.is_symlink()]
    defined = set()
    for path in [*own, *(torch / "lib").glob("*.so*")]:
        defined |= {name.split("@")[0] for name in _dynamic(path, "--defined-only")}
    linked = set()
    for path in own:
        linked |= {name for name in _dynamic(path, "--undefined-only") if "@" not in name}
    linked = {name for name in linked if name not in defined and not FOREIGN.match(name)}
    content = (torch_npu / "lib" / "libtorch_npu.so").read_bytes()
    return linked | {name.decode() for name in LOOKED_UP.findall(content)}


def _dynamic(path: Path, which: str) -> set[str]:
    listed = subprocess.run(
        ["nm", "-D", "--with-symbol-versions", which, path], check=True, capture_output=True, text=True
    )
    return {line.split()[-1] for line in listed.stdout.splitlines() if line.strip()}
