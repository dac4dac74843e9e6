"""The command ``glm-image``: its arguments, its exit codes, and its message if no server answers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glm_image_client import GlmImageClient, UnreachableError, __version__
from glm_image_client.cli import app
from glm_image_client.options import OPTIONS, PreviewOptions


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A bound port without a listener."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize("scheme", ["grpc", "http"])
class TestNoServer:
    def test_every_call_raises_unreachable_error(self, scheme: str, closed_port: int) -> None:
        with GlmImageClient(f"{scheme}://127.0.0.1:{closed_port}", timeout=20) as client:
            assert not client.server_ready()
            for call in (client.model_metadata, lambda: client.generate("x"), lambda: client.prior_tokens("x")):
                with pytest.raises(UnreachableError, match=f"no server answers at 127.0.0.1:{closed_port}: .*refused"):
                    call()

    def test_command_exits_3_with_one_sentence(self, scheme: str, closed_port: int, tmp_path: Path) -> None:
        url = f"{scheme}://127.0.0.1:{closed_port}"
        done = CliRunner().invoke(app, ["generate", "x", "--url", url, "-o", str(tmp_path / "a.png")])
        assert (done.exit_code, done.stdout) == (3, "")
        assert done.stderr.startswith("glm-image: no server answers at")
        assert "start one with `glm-image serve --checkpoint DIR`" in done.stderr
        assert done.stderr.count("\n") == 1
        waited = CliRunner().invoke(
            app, ["generate", "x", "--url", url, "--wait", "0.1", "-o", str(tmp_path / "a.png")]
        )
        assert (waited.exit_code, waited.stdout) == (3, "")
        assert waited.stderr.endswith("(waited 0.1 s)\n")

    def test_environment_variable_names_the_server(self, scheme: str, closed_port: int, tmp_path: Path) -> None:
        environment = {"GLM_IMAGE_URL": f"127.0.0.1:{closed_port}"}
        arguments = ["generate", "x", "--protocol", scheme, "-o", str(tmp_path / "a.png")]
        done = CliRunner().invoke(app, arguments, env=environment)
        assert done.exit_code == 3
        assert f"127.0.0.1:{closed_port}" in done.stderr


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--size", "1024"], "--size is '1024'; allowed: WIDTHxHEIGHT"),
            (["--size", "64x-64"], "--size is"),
            (["--size", "64x64x64"], "--size is"),
            (["-o", "a.gif"], "output 'a.gif' ends in '.gif'"),
            (["-o", "a"], "output 'a' ends in ''"),
            (["-o", "no/such/folder/a.png"], "--output is"),
            (["-o", "a\0/b.png"], "--output is"),
            (["--image", "no_such.png"], "--image 'no_such.png' cannot be read"),
            (["--url", "ftp://box"], "--url is 'ftp://box'"),
            (["--url", ""], "--url is ''"),
            (["--timeout", "0"], "--timeout is 0.0"),
            (["--request-id", ""], "--request-id is ''"),
            (["--seed", str(2**64)], f"--seed is {2**64}"),
            (["--steps", str(2**31)], f"--steps is {2**31}"),
            (["-n", str(2**31)], f"-n is {2**31}"),
            (["--offline"], "--offline needs --checkpoint"),
            (["--checkpoint", "folder"], "need --offline"),
            (["--offline", "--checkpoint", "folder"], "--checkpoint is 'folder', which cannot be loaded: "),
            (["--prompts", "a.txt"], "PROMPT is 'x', and --prompts is given too"),
            (["--resume"], "--resume needs --prompts"),
        ],
    )
    def test_bad_arguments_exit_2_with_one_sentence(
        self, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        done = CliRunner().invoke(app, ["generate", "x", *arguments])
        assert (done.exit_code, done.stdout) == (2, "")
        assert message in done.stderr
        assert done.stderr.startswith("glm-image: ")
        assert done.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
        as_json = CliRunner().invoke(app, ["generate", "x", "--json", *arguments])
        assert (as_json.exit_code, as_json.stderr) == (2, "")
        error = json.loads(as_json.stdout)
        assert message in error["error"]
        assert (error["kind"], error["exit_code"]) == ("BadArgumentError", 2)

    @pytest.mark.parametrize("arguments", [["--steps", "many"], ["--protocol", "smtp"], ["--nonsense"], ["x", "y"]])
    def test_unparsable_arguments_exit_2(self, arguments: list[str]) -> None:
        done = CliRunner().invoke(app, ["generate", *arguments])
        assert done.exit_code == 2
        assert "Error: " in done.stderr
        assert "Traceback" not in done.stderr
        as_json = CliRunner().invoke(app, ["generate", "--json", *arguments])
        assert (as_json.exit_code, json.loads(as_json.stdout)["kind"]) == (2, "UsageError")

    def test_every_option_has_a_flag(self) -> None:
        shown = CliRunner().invoke(app, ["generate", "--help"]).stdout
        derived = {"height": "--size", "width": "--size", "output_format": "--output"}
        for name, option in OPTIONS.items():
            if name in PreviewOptions.__annotations__:
                continue
            for flag in option.input.flags or (derived[name],):
                assert flag in shown
        assert "Text to render" in shown

    def test_every_command_has_its_whole_help(self) -> None:
        shown = CliRunner().invoke(app, ["-h"]).stdout
        assert "..." not in shown.partition("Commands:")[2]
        for name in ("generate", "edit", "tokens", "paint", "serve", "cancel", "status", "inspect"):
            assert f"\n  {name} " in shown
        placeholders = CliRunner().invoke(app, ["edit", "-h"]).stdout
        assert all(field in placeholders for field in ("{width}", "{height}", "{seed}", "{index}"))

    def test_version(self) -> None:
        done = CliRunner().invoke(app, ["--version"])
        assert (done.exit_code, done.stdout) == (0, f"glm-image {__version__}\n")

    def test_shell_completion(self) -> None:
        environment = {"_GLM_IMAGE_COMPLETE": "complete_bash", "COMP_WORDS": "glm-image gen", "COMP_CWORD": "1"}
        assert CliRunner().invoke(app, [], env=environment).stdout.split() == ["generate"]

    def test_serve_is_the_servers_own_command(self, tmp_path: Path) -> None:
        command = [sys.executable, "-c", "from glm_image_client.cli import main; main()", "serve"]
        shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
        assert shown.startswith("usage: glm-image serve ")
        assert "--drain-seconds" in shown
        done = CliRunner().invoke(app, ["serve", "--checkpoint", str(tmp_path)])
        assert done.exit_code == 2
        assert "which has no model_index.json" in done.stderr

    def test_client_imports_no_engine(self) -> None:
        code = "import sys, glm_image_client.cli; print({'torch', 'glm_image', 'transformers'} & set(sys.modules))"
        client = Path(sys.modules["glm_image_client"].__file__ or "").parents[1]
        found = subprocess.run([sys.executable, "-c", code], cwd=client, capture_output=True, text=True, check=True)
        assert found.stdout == "set()\n"
