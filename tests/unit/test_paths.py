"""Paths that an operator names, and the run directory that gives the server ASCII links to them."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm_image.errors import CheckpointError, ConfigurationError
from glm_image.supervisor import python_environment, run_directory
from glm_image.supervisor.run_directory import MAX_PARENT_CHARACTERS, PREFIX, RunDirectory, is_plain, remove_dead
from glm_image.supervisor.settings import ServerSettings
from glm_image.watchdog.leftovers import SHARED_MEMORY

AWKWARD = ["中文", "a b", "it's", 'a"b', "a\nb", "a;b", "$(a)", "a:b", "a,b", "é", "\udcff"]
LONG = Path("/" + "/".join(["a" * 255] * 16))


def settings_over(tmp_path: Path, checkpoint: str = "checkpoint", repository: str = "models") -> ServerSettings:
    (tmp_path / checkpoint).mkdir()
    (tmp_path / checkpoint / "model_index.json").write_text("{}")
    (tmp_path / repository / "worker").mkdir(parents=True)
    (tmp_path / repository / "worker" / "config.pbtxt").write_text("")
    return ServerSettings(tmp_path / checkpoint, model_repository=tmp_path / repository)


@pytest.fixture
def usable_parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder of /dev/shm, as pytest's may be too long."""
    folder = SHARED_MEMORY / f"glm-test-{os.getpid()}"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    folder.rmdir()


class TestSettings:
    @pytest.mark.parametrize("name", AWKWARD)
    def test_every_name_of_a_folder_is_allowed(self, tmp_path: Path, name: str) -> None:
        settings_over(tmp_path, f"checkpoint {name}", f"models {name}").check()

    def test_path_that_is_too_long_is_refused(self, tmp_path: Path) -> None:
        settings = settings_over(tmp_path)
        fault = r"which cannot be used \(File name too long\)"
        with pytest.raises(CheckpointError, match=rf"--checkpoint is /aaa.*\.\.\., {fault}; allowed: a checkpoint"):
            ServerSettings(LONG, model_repository=settings.model_repository).check()
        with pytest.raises(ConfigurationError, match=rf"the model repository is /aaa.*, {fault}; allowed: a folder"):
            ServerSettings(settings.checkpoint, model_repository=LONG).check()
        with pytest.raises(ConfigurationError, match=rf"--request-log is /aaa.*, {fault}; allowed: the path of a file"):
            ServerSettings(settings.checkpoint, model_repository=settings.model_repository, request_log=LONG).check()

    def test_checkpoint_is_a_file(self, tmp_path: Path) -> None:
        settings = settings_over(tmp_path)
        with pytest.raises(CheckpointError, match=r"--checkpoint is .*, which is not a folder; allowed"):
            ServerSettings(settings.checkpoint / "model_index.json", model_repository=settings.model_repository).check()

    def test_model_with_an_awkward_name_is_refused(self, tmp_path: Path) -> None:
        settings = settings_over(tmp_path)
        (settings.model_repository / "my model").mkdir()
        (settings.model_repository / "my model" / "config.pbtxt").write_text("")
        with pytest.raises(ConfigurationError, match="has the model my model; allowed: letters and digits of ASCII"):
            settings.check()

    def test_relative_path_in_a_removed_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = settings_over(tmp_path)
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        settings.absolute()
        with pytest.raises(ConfigurationError, match="a relative path is given, and the working directory cannot be"):
            ServerSettings(Path("checkpoint"), model_repository=settings.model_repository).absolute()

    @pytest.mark.parametrize(
        ("kind", "fault"),
        [
            ("folder", "which is a folder"),
            ("missing/log", "whose folder does not exist"),
            ("file/log", r"which cannot be used \(Not a directory\)"),
        ],
    )
    def test_request_log_that_cannot_be_a_file(self, tmp_path: Path, kind: str, fault: str) -> None:
        settings = settings_over(tmp_path)
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").touch()
        with pytest.raises(ConfigurationError, match=rf"--request-log is .*, {fault}; allowed: the path of"):
            ServerSettings(
                settings.checkpoint, model_repository=settings.model_repository, request_log=tmp_path / kind
            ).check()

    def test_request_log_may_be_a_pipe_or_a_device(self, tmp_path: Path) -> None:
        settings = settings_over(tmp_path)
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", Path("/dev/full"), tmp_path / "new"):
            ServerSettings(settings.checkpoint, model_repository=settings.model_repository, request_log=path).check()
        assert not (tmp_path / "new").exists()


class TestRunDirectory:
    def test_awkward_paths_become_links(self, tmp_path: Path, usable_parent: Path) -> None:
        made = RunDirectory.create()
        try:
            assert made.path.parent == usable_parent
            assert made.path.stat().st_mode & 0o777 == 0o700
            for number, name in enumerate(AWKWARD):
                (tmp_path / name).mkdir()
                link = made.plain(tmp_path / name, f"link{number}")
                assert is_plain(link)
                assert Path(link).samefile(tmp_path / name)
                assert made.with_targets(f"{link}/x is missing").endswith("/x is missing")
                assert str(made.path) not in made.with_targets(link)
            assert made.plain("/plain/path", "none") == "/plain/path"
            deep = tmp_path / ("d" * 200) / ("e" * 200)
            deep.mkdir(parents=True)
            assert Path(made.plain(deep, "deep")).samefile(deep)
        finally:
            made.remove()
        assert not made.path.exists()

    def test_environment_names_links_for_folders(self, tmp_path: Path, usable_parent: Path) -> None:
        (tmp_path / "家").mkdir()
        made = RunDirectory.create()
        try:
            variables = {"HOME": str(tmp_path / "家"), "NAME": "家", "PLAIN": "/tmp", "GONE": "/没有"}
            changed = made.plain_environment(variables)
            assert Path(changed["HOME"]).samefile(tmp_path / "家")
            assert changed["HOME"].isascii()
            assert {**variables, "HOME": ""} == {**changed, "HOME": ""}
        finally:
            made.remove()

    @pytest.mark.parametrize("name", ["中文", "a b", "x" * 90])
    def test_temporary_folder_that_is_no_place_for_sockets(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        (tmp_path / name).mkdir()
        monkeypatch.setenv("TMPDIR", str(tmp_path / name))
        made = RunDirectory.create()
        try:
            assert is_plain(made.path.parent)
            assert len(str(made.path.parent)) <= MAX_PARENT_CHARACTERS
        finally:
            made.remove()

    def test_temporary_folder_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TMPDIR", "/nowhere/at all")
        with pytest.raises(ConfigurationError, match="TMPDIR is /nowhere/at all, which is not a folder; allowed: a"):
            RunDirectory.create()

    def test_no_folder_can_be_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TMPDIR", "/proc")
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/sys")
        monkeypatch.setattr(run_directory, "OTHER_PARENTS", ())
        with pytest.raises(ConfigurationError, match="none of /proc, /sys can be written; set TMPDIR"):
            RunDirectory.create()

    def test_only_what_dead_servers_left_is_removed(self, usable_parent: Path) -> None:
        alive, dead = RunDirectory.create(), RunDirectory.create()
        regions = [SHARED_MEMORY / f"{made.shm_prefix}region" for made in (alive, dead)]
        other = usable_parent / f"{PREFIX}of-another"
        other.mkdir()
        try:
            for region in regions:
                region.touch()
            (dead.path / "heartbeats").mkdir()
            dead.close()  # as the kernel does when its processes have ended
            remove_dead()
            assert [made.path.exists() for made in (alive, dead)] == [True, False]
            assert [region.exists() for region in regions] == [True, False]
            assert other.exists()
        finally:
            alive.remove()
            other.rmdir()
        assert not regions[0].exists()

    def test_lock_is_the_one_that_systemd_respects(self, usable_parent: Path) -> None:
        made = RunDirectory.create()
        descriptor = os.open(made.path, os.O_RDONLY)
        try:
            for kind in (fcntl.LOCK_SH, fcntl.LOCK_EX):
                with pytest.raises(BlockingIOError):
                    fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
            made.remove()


def test_environment_with_awkward_paths_is_copied(tmp_path: Path, usable_parent: Path) -> None:
    packages = tmp_path / "包 site-packages"
    packages.mkdir()
    (packages / "a_package_of_this_test.py").write_text("found = True")
    made = RunDirectory.create()
    try:
        programs = python_environment._copy(made.path / "python", [packages, *map(Path, sys.path[-1:])], made.plain)
        assert str(programs).isascii()
        program = "import a_package_of_this_test, sys; print(sys.prefix); print(sys.path)"
        printed = subprocess.run(
            [programs / "python3", "-I", "-c", program], capture_output=True, text=True, check=True, env={"LC_ALL": "C"}
        ).stdout
        assert printed.splitlines()[0] == str(made.path / "python")
        assert printed.isascii()
    finally:
        made.remove()
