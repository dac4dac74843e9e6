"""``glm-image inspect`` against modules that are built and files that are written here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from glm_image.ar.config import ArConfig
from glm_image.ar.memory import decoder_parameters
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.errors import CheckpointError
from glm_image.sizing.inspect import Inspection, inspect, read_header
from glm_image_client.cli import app
from helpers import MakeCheckpoint
from make_tiny_checkpoint import FULL, PARTS, TinyConfig, make_tiny_checkpoint, part_shapes

# Parameters of the published model.
PUBLISHED = {"vision_language_encoder": 10_114_245_632, "transformer": 6_926_882_880} | {
    "text_encoder": 217_657_472,
    "vae": 406_100_643,
}


@pytest.fixture
def copy(checkpoint_folder: Path, tmp_path: Path) -> Path:
    """A tiny checkpoint to break."""
    return Path(shutil.copytree(checkpoint_folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published sizes: configs and indices, no tensors."""
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("full") / "GLM-Image", FULL, weights=False)
    for part in PARTS:
        names = list(part_shapes(part, FULL))
        files = [f"{part.stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
        weight_map = {name: files[index * 2 // len(names)] for index, name in enumerate(names)}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / part.folder / f"{part.stem}.safetensors.index.json").write_text(json.dumps(index))
    return folder


def stage(found: Inspection, name: str, dtype: str) -> Any:
    return next(memory for memory in found.stages if (memory.stage, memory.dtype) == (name, dtype))


class TestPublishedSizes:
    def test_parameters(self, full: Path) -> None:
        found = {part.part: part.parameters for part in inspect(full).parts if part.parameters}
        assert found == PUBLISHED
        decoder = ArConfig.read(Checkpoint.open(full))
        assert decoder_parameters(decoder) == 8_847_155_200 + decoder.vision_vocab_size * decoder.hidden_size

    def test_memory(self, full: Path) -> None:
        found = inspect(full)
        ar, dit = stage(found, "glm_ar", "bfloat16"), stage(found, "glm_dit", "bfloat16")
        in_gigabytes = {name: round(size / 1e9, 2) for name, size in (ar.weights | dit.weights).items()}
        assert in_gigabytes == {
            "language model": 17.69,
            "vision and head": 2.6,
            "transformer": 13.85,
            "text_encoder": 0.44,
            "vae": 0.81,
        }
        assert found.slots == (8, 8192)
        assert ar.cache == 8 * 8192 * 40_960
        assert round(ar.working / 1e9, 2) == 1.67
        assert round(dit.working / 1e9, 2) == 6.01
        single = stage(found, "glm_ar", "float32")
        assert (single.cache, single.weights["language model"]) == (2 * ar.cache, 2 * ar.weights["language model"])
        assert stage(found, "glm_dit", "float32").total == 2 * dit.total

    @pytest.mark.parametrize(
        ("gigabytes", "fits"),
        [
            (16, {"glm_ar": False, "glm_dit": False, "both": False}),
            (24, {"glm_ar": False, "glm_dit": True, "both": False}),
            (32, {"glm_ar": True, "glm_dit": True, "both": False}),
            (64, {"glm_ar": True, "glm_dit": True, "both": True}),
        ],
    )
    def test_fits(self, full: Path, gigabytes: float, fits: dict[str, bool]) -> None:
        assert inspect(full).fits(gigabytes)["bfloat16"] == fits

    def test_token_ids(self, full: Path) -> None:
        assert inspect(full).token_ids == {
            "codebook": 16384,
            "image_start": 16384,
            "image_end": 16385,
            "image": 167855,
            "pad": 167841,
            "grid_bos": 167845,
            "grid_eos": 167846,
        }

    def test_files_named_only_by_an_index_are_missing(self, full: Path) -> None:
        found = inspect(full)
        assert [part.files for part in found.parts if part.part == "vae"] == [
            {f"diffusion_pytorch_model-0000{number}-of-00002.safetensors": None for number in (1, 2)}
        ]
        assert sum("is missing" in fault for fault in found.faults) == 8


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"dtype": "bfloat16", "max_shard_size": 100_000},
        {"ar_layers": 3, "ar_head_dim": 48, "ar_kv_heads": 4, "vision_depth": 1, "vq_dim": 24},
        {"glyph_layers": 3, "glyph_ffn": 40, "dit_layers": 1, "dit_heads": 3, "latent_channels": 8},
        {"vae_widths": (8, 16, 24, 32), "vae_layers": 2},
    ],
)
def test_parameters_by_config_are_those_of_the_modules(make_checkpoint: MakeCheckpoint, sizes: dict[str, Any]) -> None:
    found = inspect(make_checkpoint(**sizes))
    assert found.faults == []
    config = TinyConfig(**sizes)
    for part in (part for part in found.parts if part.parameters):
        assert part.stored_parameters == part.parameters
        assert part.dtypes == {config.dtype: part.parameters}
        assert None not in part.files.values()


class TestFaults:
    def test_a_truncated_file(self, copy: Path) -> None:
        file = copy / "vae" / "diffusion_pytorch_model.safetensors"
        whole = file.stat().st_size
        file.write_bytes(file.read_bytes()[:-7])
        assert inspect(copy).faults == [f"{file} has {whole - 7} bytes; by its header it has {whole}"]

    @pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x04\0\0\0\0\0\0\0null"])
    def test_a_file_of_another_format(self, copy: Path, content: bytes) -> None:
        file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(content)
        (fault,) = inspect(copy).faults
        assert fault.startswith(f"{file} is not a safetensors file: ")
        with pytest.raises(CheckpointError):
            read_header(file)

    def test_weights_of_other_sizes(self, copy: Path) -> None:
        file = copy / "transformer" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "num_layers": 3}))
        (fault,) = inspect(copy).faults
        assert "transformer holds 198,912 parameters; by its config it has" in fault

    def test_a_missing_shard(self, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(make_checkpoint(max_shard_size=100_000), tmp_path / "shards"))
        shard = sorted((folder / "vae").glob("*.safetensors"))[0]
        shard.unlink()
        found = inspect(folder)
        assert found.faults == [f"{shard} is missing"]
        assert found.to_json()["complete"] is False

    def test_a_config_with_a_missing_entry(self, copy: Path) -> None:
        (copy / "vae" / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="a config has no block_out_channels"):
            inspect(copy)

    def test_an_unsupported_value(self, copy: Path) -> None:
        file = copy / "vision_language_encoder" / "config.json"
        config = json.loads(file.read_text())
        config["text_config"]["hidden_act"] = "relu"
        file.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"text_config\.hidden_act is 'relu'; allowed: 'silu'"):
            inspect(copy)


class TestCommand:
    def test_text(self, checkpoint_folder: Path) -> None:
        done = CliRunner().invoke(app, ["inspect", str(checkpoint_folder), "--card", "24"])
        assert done.exit_code == 0
        assert "AutoencoderKL: 262,803 parameters, 1 of 1 files, float32" in done.stdout
        assert "fits a card of 24 GB" in done.stdout
        assert "fault" not in done.stdout

    def test_json(self, checkpoint_folder: Path) -> None:
        done = CliRunner().invoke(app, ["inspect", str(checkpoint_folder), "--json"])
        report = json.loads(done.stdout)
        assert report == inspect(checkpoint_folder).to_json()
        assert report["complete"] is True
        assert "card" not in report

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [(["--card", "0"], "--card is 0.0; allowed: a number of GB above 0"), ([], "model_index.json: no such file")],
    )
    def test_refusals(self, tmp_path: Path, arguments: list[str], message: str) -> None:
        done = CliRunner().invoke(app, ["inspect", str(tmp_path), *arguments])
        assert (done.exit_code, done.stdout) == (2, "")
        assert message in done.stderr

    def test_inspect_imports_no_torch(self) -> None:
        code = (
            "import sys, glm_image.sizing.inspect; print({'torch', 'transformers', 'safetensors'} & set(sys.modules))"
        )
        package = Path(sys.modules["glm_image"].__file__ or "").parents[1]
        found = subprocess.run([sys.executable, "-c", code], cwd=package, capture_output=True, text=True, check=True)
        assert found.stdout == "set()\n"
