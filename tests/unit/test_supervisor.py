"""The parts of the supervisor that need no server: settings, log parsing, requirements, installation."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import glm_image
from glm_image.errors import CheckpointError, ConfigurationError
from glm_image.supervisor.addresses import authority, service_flags
from glm_image.supervisor.api_access import CLOSABLE_APIS, closing_flags, is_loopback
from glm_image.supervisor.cli import parse_arguments
from glm_image.supervisor.installation import Installation
from glm_image.supervisor.ports import ReservedPorts, listens
from glm_image.supervisor.requirements import check_bundled_server, libpython_directory
from glm_image.supervisor.settings import ServerSettings, default_model_repository
from glm_image.supervisor.triton_log import (
    SERVICES,
    start_failure,
    started_service,
    syntax_error,
    unloaded_model,
)
from glm_image.watchdog.leftovers import SHARED_MEMORY, remove_leftovers
from glm_image.watchdog.limits import MAX_DESCRIPTORS, SERVER_STACK_BYTES, descriptor_limit, stack_limit

PACKAGE = Path(glm_image.__file__).parent


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model_index.json").write_text("{}")
    for model, profiles in {"glm_ar": ["cuda", "ascend"], "glm_dit": ["cuda"]}.items():
        (tmp_path / "models" / model / "configs").mkdir(parents=True)
        for config in ["config", *(f"configs/{profile}" for profile in profiles)]:
            (tmp_path / "models" / model / f"{config}.pbtxt").write_text("")
    return ServerSettings(checkpoint, model_repository=tmp_path / "models")


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def changed(settings: ServerSettings, **values: object) -> ServerSettings:
    return ServerSettings(**{**vars(settings), **values})


class TestSettings:
    def test_usable_settings_pass(self, settings: ServerSettings) -> None:
        settings.check()
        changed(settings, profile="ascend").check()

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"profile": "tpu"}, "--profile is tpu; allowed: ascend, cuda"),
            ({"profile": "../cuda"}, "--profile is ../cuda; allowed: ascend, cuda"),
            ({"http_port": -1}, r"--http-port is -1; allowed: 0 \(any free one\) to 65535"),
            ({"metrics_port": 65536}, "--metrics-port is 65536; allowed: 0"),
            ({"drain_seconds": -1}, "--drain-seconds is -1; allowed: 0 or more"),
            ({"max_request_bytes": 0}, "--max-request-bytes is 0; allowed: 1 or more"),
            ({"open_apis": ("trace", "all")}, "--open-apis has all; allowed: model-repository, shared-memory, trace"),
            ({"host": "192.0.2.1", "http_port": 8000}, "--host is 192.0.2.1; allowed: an address of this machine"),
        ],
    )
    def test_refusals_name_flag_value_and_what_is_allowed(
        self, settings: ServerSettings, values: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=message):
            changed(settings, **values).check()

    def test_one_port_for_two_services(self, settings: ServerSettings) -> None:
        with pytest.raises(ConfigurationError, match="--grpc-port is 8000, which is also --http-port"):
            changed(settings, http_port=8000, grpc_port=8000).check()

    def test_busy_port(self, settings: ServerSettings, busy_port: int) -> None:
        with pytest.raises(ConfigurationError, match=f"--grpc-port is {busy_port}, on which 127.0.0.1 already listens"):
            changed(settings, grpc_port=busy_port).check()

    def test_checkpoint_folder_missing(self, settings: ServerSettings, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="nowhere, which is not a folder"):
            changed(settings, checkpoint=tmp_path / "nowhere").check()

    def test_folder_is_no_checkpoint(self, settings: ServerSettings, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
            changed(settings, checkpoint=tmp_path).check()

    def test_repository_without_models(
        self, settings: ServerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)  # whose name may exceed the length to which paths are shortened
        with pytest.raises(ConfigurationError, match=r"the model repository is .*checkpoint; allowed:"):
            changed(settings, model_repository=Path("checkpoint")).check()

    def test_repository_of_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GLM_IMAGE_MODEL_REPOSITORY", str(tmp_path))
        assert default_model_repository() == tmp_path

    def test_flags_match_the_contract(self) -> None:
        flags = parse_arguments(["--checkpoint", "weights"])
        assert vars(flags) == {
            "checkpoint": Path("weights"),
            "profile": None,
            "host": "127.0.0.1",
            "http_port": 8000,
            "grpc_port": 8001,
            "metrics_port": 8002,
            "drain_seconds": 60,
            "open_apis": (),
            "max_request_bytes": 192 * 1024 * 1024,
            "max_restarts": 5,
            "gateway": None,
            "request_log": None,
            "log_prompts": False,
            "otlp_traces_endpoint": None,
            "trace_rate": 1,
            "model_repository": None,
            "models": (),
        }


class TestLog:
    def test_services(self) -> None:
        lines = [
            'I1122 02:09:40.037922 4840 grpc_server.cc:2558] "Started GRPCInferenceService at 127.0.0.1:18001"\n',
            'I1122 02:09:40.038247 4840 http_server.cc:4713] "Started HTTPService at 127.0.0.1:18000"\n',
            'I1122 02:09:40.079904 4840 http_server.cc:362] "Started Metrics Service at 127.0.0.1:18002"\n',
            "I1122 02:09:39.079904 4840 model_lifecycle.cc:839] \"successfully loaded 'good'\"\n",
        ]
        assert [started_service(line) for line in lines[3:]] == [None]
        assert {started_service(line) for line in lines[:3]} == SERVICES

    @pytest.mark.parametrize(
        ("reason", "message"),
        [
            (
                r"Internal: CheckpointError: /x has no\nvae/config.json\n\nAt:\n  /m/1/model.py(3): initialize\n",
                "/x has no\nvae/config.json",
            ),
            (r"Internal: KeyError: 'width'\n\nAt:\n  /m/1/model.py(3): initialize\n", "KeyError: 'width'"),
            (r"Internal: ConfigurationError: devices is \"gpu\"; allowed: cpu", 'devices is "gpu"; allowed: cpu'),
            ("Internal: Stub process 'glm_ar_0_0' is not healthy.", "Stub process 'glm_ar_0_0' is not healthy."),
            ("Invalid argument: unable to find backend library", "unable to find backend library"),
        ],
    )
    def test_model_failure_has_the_models_message(self, reason: str, message: str) -> None:
        line = f"E1122 02:06:43.4 4474 model_lifecycle.cc:642] \"failed to load 'glm_ar' version 1: {reason}\"\n"
        assert start_failure(line) == f"glm_ar failed to load: {message}"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (
                "E1122 02:11:53.3 5387 model_repository_manager.cc:1460] \"Poll failed for model directory 'cfg': "
                'failed to read text proto from /r/cfg/config.pbtxt"',
                "cfg failed to load: failed to read text proto from /r/cfg/config.pbtxt",
            ),
            (
                'E1122 02:11:55.4 5428 model_repository_manager.cc:703] "Invalid argument: ensemble ens contains '
                'models that are not available or ambiguous: imp"',
                "ens failed to load: ensemble ens contains models that are not available or ambiguous: imp",
            ),
            (
                "I1122 02:10:17.0 5157 pb_stub.cc:2105]  Failed to preinitialize Python stub: "
                "Python model file not found in '/r/nofile/1/model.py'",
                "a model failed to load: Python model file not found in '/r/nofile/1/model.py'",
            ),
        ],
    )
    def test_other_failures(self, line: str, message: str) -> None:
        assert start_failure(line + "\n") == message

    def test_unreadable_file_is_reported_with_line_and_column(self) -> None:
        logged = '[libprotobuf ERROR /b/t.cc:337] Error parsing text-format inference.ModelConfig: 12:11: No "x".\n'
        failed = (
            "E1122 02:10:17.0 5157 model_repository_manager.cc:1460] \"Poll failed for model directory 'glm_dit': "
            'failed to read text proto from /r/glm_dit/config.pbtxt"\n'
        )
        message = "glm_dit failed to load: failed to read text proto from /r/glm_dit/config.pbtxt"
        assert start_failure(failed) == message
        assert syntax_error(failed) is None
        place = syntax_error(logged)
        assert start_failure(failed, place) == f'{message}, line and column 12:11: No "x".'

    def test_port_taken_by_another_process(self) -> None:
        failure = start_failure(
            'E1122 02:11:17.7 5269 main.cc:245] "failed to start GRPC service: Unavailable - '
            "Socket '127.0.0.1:18001' already in use \"\n"
        )
        assert failure == "Socket '127.0.0.1:18001' already in use"

    @pytest.mark.parametrize(
        ("line", "unloaded"),
        [
            ("I1122 08:51:44.0 9 model_lifecycle.cc:624] \"successfully unloaded 'glm_ar' version 1\"\n", "glm_ar"),
            ("2026-11-22 08:51:42,993 glm_ar_0_0 a prompt: \"successfully unloaded 'glm_ar' version 1\" \\n", None),
        ],
    )
    def test_unloaded_model_is_read_from_the_end_of_a_line(self, line: str, unloaded: str | None) -> None:
        assert unloaded_model(line) == unloaded

    def test_an_ordinary_line(self) -> None:
        assert start_failure("I1122 02:06:43.2 4474 model_lifecycle.cc:839] \"successfully loaded 'good'\"\n") is None


class TestPorts:
    @pytest.fixture
    def reserved(self) -> Iterator[ReservedPorts]:
        reserved = ReservedPorts("127.0.0.1", {"--http-port": 0, "--grpc-port": 0})
        yield reserved
        reserved.release()

    def test_free_ports_replace_zeros_only(self, reserved: ReservedPorts) -> None:
        named = reserved.numbers["--grpc-port"]
        chosen = ReservedPorts("127.0.0.1", {"--http-port": 0, "--grpc-port": named, "--metrics-port": 0})
        chosen.release()
        assert chosen.numbers["--grpc-port"] == named
        assert len({*chosen.numbers.values(), 0}) == 4

    def test_another_process_does_not_get_a_reserved_port(self, reserved: ReservedPorts) -> None:
        with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
            other.bind(("127.0.0.1", reserved.numbers["--http-port"]))

    def test_the_server_listens_on_a_reserved_port(self, reserved: ReservedPorts) -> None:
        ports = reserved.numbers.values()
        assert not listens(os.getpid(), ports)
        with contextlib.ExitStack() as listeners:
            for port in ports:
                assert not listens(os.getpid(), ports)
                listeners.enter_context(socket.create_server(("127.0.0.1", port)))  # with SO_REUSEADDR, as Triton
            assert listens(os.getpid(), ports)
            assert not listens(os.getppid(), ports)
        assert not listens(os.getpid(), ports)

    def test_a_process_that_has_ended_does_not_listen(self) -> None:
        with subprocess.Popen(["true"]) as ended:
            pass
        assert not listens(ended.pid, [])


class TestRequirements:
    @pytest.mark.parametrize(
        ("machine", "libc", "message"),
        [
            ("aarch64", "glibc 2.39", "runs on x86_64, this machine is aarch64: run in a Triton container"),
            ("x86_64", "glibc 2.31", r"needs glibc 2\.35 or newer, and this machine has glibc 2\.31"),
            ("x86_64", "another C library", r"needs glibc 2\.35 or newer, and this machine has another C library"),
        ],
    )
    def test_unsupported_machine_is_refused(self, machine: str, libc: str, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            check_bundled_server(machine, libc)

    def test_libpython_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"libpython3\.\d+\.so\.1\.0, .* is missing .* install libpython3"):
            libpython_directory([tmp_path])

    def test_libpython_is_found(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError) as missing:
            libpython_directory([])
        (tmp_path / str(missing.value).split(",")[0]).touch()
        assert libpython_directory([tmp_path / "elsewhere", tmp_path]) == tmp_path


def test_backends_are_linked(tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    for part in ("python/libtriton_python.so", "python/triton_python_backend_stub", "onnx/libtriton_onnx.so"):
        (installed / "backends" / part).parent.mkdir(parents=True, exist_ok=True)
        (installed / "backends" / part).write_text(part)
    (tmp_path / "stub").write_text("the stub of this Python")

    backends = Installation(installed, tmp_path / "stub", ()).lay_out_backends(tmp_path / "run")

    assert (backends / "python" / "triton_python_backend_stub").read_text() == "the stub of this Python"
    assert (backends / "python" / "libtriton_python.so").resolve().is_relative_to(installed)
    assert (backends / "onnx" / "libtriton_onnx.so").is_file()
    assert (backends / "python" / "glm_image" / "errors.py").samefile(PACKAGE / "errors.py")
    assert not (installed / "backends" / "python" / "glm_image").exists()


def test_only_the_servers_leftovers_are_removed(tmp_path: Path) -> None:
    mine, other = (SHARED_MEMORY / f"glm_image_test_{tmp_path.name}_{name}" for name in ("mine", "other"))
    (tmp_path / "run" / "backends").mkdir(parents=True)
    try:
        mine.touch()
        other.touch()
        remove_leftovers(mine.name, tmp_path / "run")
        assert not mine.exists()
        assert other.exists()
        assert not (tmp_path / "run").exists()
        remove_leftovers(mine.name, tmp_path / "run")
    finally:
        other.unlink()


class TestHost:
    @pytest.mark.parametrize(
        ("host", "address"),
        [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("::1", "::1"),
         ("[::1]", "::1"), ("::", "::")],
    )  # fmt: skip
    def test_host_becomes_a_numeric_address(self, settings: ServerSettings, host: str, address: str) -> None:
        absolute = changed(settings, host=host).absolute()
        assert absolute.host == address
        absolute.check()

    @pytest.mark.parametrize("host", ["", " ", "no.such.host.invalid", "a" * 300, "1.2.3.4.5", "::g", "[]"])
    def test_unknown_host_is_refused(self, settings: ServerSettings, host: str) -> None:
        with pytest.raises(ConfigurationError, match=r"--host is .+; allowed: an address of this machine or a name of"):
            changed(settings, host=host).absolute()

    @pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "fe80::1"])
    def test_address_of_another_machine_is_refused(self, settings: ServerSettings, host: str) -> None:
        with pytest.raises(ConfigurationError, match=rf"--host is {host}; allowed: an address of this machine"):
            changed(settings, host=host).absolute().check()

    def test_busy_port_of_ipv6(self, settings: ServerSettings) -> None:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
            port = listener.getsockname()[1]
            changed(settings, host="127.0.0.1", http_port=port).check()
            with pytest.raises(ConfigurationError, match=f"--http-port is {port}, on which ::1 already listens"):
                changed(settings, host="::1", http_port=port).check()

    def test_addresses_are_written_as_each_service_reads_them(self) -> None:
        assert service_flags("::1") == [
            "--http-address=ipv6:::1", "--grpc-address=[::1]", "--metrics-address=ipv6:::1"
        ]  # fmt: skip
        assert {flag.split("=")[1] for flag in service_flags("127.0.0.1")} == {"127.0.0.1"}
        assert (authority("::1", 8000), authority("127.0.0.1", 8000)) == ("[::1]:8000", "127.0.0.1:8000")


class TestLimits:
    def test_stack(self) -> None:
        kib, none = 1024, resource.RLIM_INFINITY
        assert stack_limit(8 * kib, none, none) == SERVER_STACK_BYTES
        assert stack_limit(none, none, none) == SERVER_STACK_BYTES
        assert stack_limit(8 * kib, 64 * kib, none) == 64 * kib
        assert stack_limit(2 * SERVER_STACK_BYTES, none, none) == 2 * SERVER_STACK_BYTES
        assert stack_limit(8 * kib, none, 32 * 2**30) == 8 * kib  # a hundred stacks must fit

    def test_descriptors(self) -> None:
        none = resource.RLIM_INFINITY
        assert descriptor_limit(1024, 524_288) == 524_288
        assert descriptor_limit(1024, none) == MAX_DESCRIPTORS
        assert descriptor_limit(1024, 2**30) == MAX_DESCRIPTORS
        assert descriptor_limit(2**30, 2**30) == 2**30
        assert descriptor_limit(1024, 1024) == 1024

    def test_address_space_is_warned_about(self) -> None:
        program = "from glm_image.supervisor.host_limits import limit_warning; print(limit_warning())"
        limit = (16 * 2**30, resource.RLIM_INFINITY)
        for limited, expected in ((False, "None"), (True, "the address space is limited to 16.0 GiB (ulimit -v)")):
            printed = subprocess.run(
                [sys.executable, "-c", program], capture_output=True, text=True, check=True,
                preexec_fn=lambda limited=limited: limited and resource.setrlimit(resource.RLIMIT_AS, limit),
            ).stdout  # fmt: skip
            assert printed.startswith(expected)


class TestAccess:
    def test_all_apis_are_restricted_over_both_protocols(self) -> None:
        http, grpc = closing_flags(())
        assert http.startswith("--http-restricted-api=model-repository,shared-memory,trace,logging:")
        assert grpc.removeprefix("--grpc-restricted-protocol=") == http.removeprefix("--http-restricted-api=")
        assert http.endswith("\n")  # which no header can carry
        assert closing_flags(())[0] != http

    def test_apis_are_opened_individually(self) -> None:
        assert closing_flags(("trace", "shared-memory"))[0].startswith(
            "--http-restricted-api=model-repository,logging:"
        )
        assert closing_flags(CLOSABLE_APIS) == []

    def test_input_limit_is_set_if_the_server_has_one(self, tmp_path: Path) -> None:
        installation = Installation(tmp_path, tmp_path / "stub", ())
        installation.binary.parent.mkdir()
        installation.binary.write_bytes(b"--http-port")
        assert installation.input_limit_flags(5) == []
        installation.binary.write_bytes(b"--http-port\0http-max-input-size\0")
        assert installation.input_limit_flags(5) == ["--http-max-input-size=5"]

    @pytest.mark.parametrize(
        ("host", "loopback"),
        [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
         ("::", False), ("192.0.2.1", False), ("no.such.host.invalid", False)],
    )  # fmt: skip
    def test_loopback_addresses(self, host: str, loopback: bool) -> None:
        assert is_loopback(host) == loopback

    def test_server_threads_get_large_stacks(self) -> None:
        program = "import resource; print(resource.getrlimit(resource.RLIMIT_STACK)[0])"
        program_file = PACKAGE / "watchdog" / "__main__.py"
        command = [sys.executable, program_file, "--shm-prefix", "none-", "--run-directory", "/nonexistent",
                   "--drain-seconds", "1", "--", sys.executable, "-c", program]  # fmt: skip
        # Its input stays open until it has ended, as the end of the input is a command to kill.
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
            assert running.stderr is not None
            limit = int(running.stderr.read())
        hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
        expected = SERVER_STACK_BYTES if hard == resource.RLIM_INFINITY else min(SERVER_STACK_BYTES, hard)
        assert limit >= expected


def test_supervisor_imports_without_packages() -> None:
    """``scripts/test`` and ``scripts/quickstart`` ask it what to install."""
    command = [sys.executable, "-S", "-c", "import glm_image.supervisor, glm_image.supervisor.requirements"]
    subprocess.run(command, check=True, env={"PYTHONPATH": str(PACKAGE.parent)})
