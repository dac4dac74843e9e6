"""The Python environment of the models' processes, which take the one whose ``python3`` is first on PATH."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

Plain = Callable[[Path, str], str]
"""Returns a path that any program can read, which may be a link of the given name."""


def program_folder(folder: Path, plain: Plain) -> Path:
    """Returns the folder for PATH: that of this Python, or a copy of its environment with ASCII paths in ``folder``.

    The Python of a model's process fails at the first path of its environment that is not ASCII, such as that of a
    project that is installed in editable form from a folder with a Chinese name.
    """
    if _is_ascii():
        return Path(sys.executable).parent
    return _copy(folder, [Path(entry) for entry in sys.path if entry], plain)


def _is_ascii() -> bool:
    paths = [sys.executable, sys.prefix, sys.base_prefix, *sys.path]
    # Files with lists of paths; those that do not exist are not in sys.path, but are read all the same.
    lists = [file for kind in ("purelib", "platlib") for file in Path(sysconfig.get_path(kind)).glob("*.pth")]
    return all(path.isascii() for path in paths) and all(file.read_bytes().isascii() for file in lists)


def _copy(folder: Path, paths: Sequence[Path], plain: Plain) -> Path:
    standard = Path(sysconfig.get_path("stdlib"))
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    others = [path for path in paths if path.is_dir() and path != standard and standard not in path.parents]
    own = [path for path in paths if path.is_dir() and path not in others and path.name.endswith("-packages")]
    lines = [plain(path.absolute(), f"packages{index}") for index, path in enumerate([*others, *own])]
    (packages / "paths.pth").write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
    home = Path(plain(Path(sys.base_prefix), "base")) / "bin"
    (folder / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n", encoding="ascii")
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").symlink_to(Path(sys.executable).resolve())
    return folder / "bin"
