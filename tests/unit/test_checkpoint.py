from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm_image.ar.config import ArConfig
from glm_image.ar.engine import ArEngine
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.checkpoint import COMPONENTS, Checkpoint
from glm_image.devices.open import open_device
from glm_image.dit.engine import DitEngine
from glm_image.dit.settings import DitSettings
from glm_image.errors import CheckpointError
from helpers import MakeCheckpoint

CPU = open_device("cpu")


def load(folder: Path) -> None:
    """Loads both stages."""
    checkpoint = Checkpoint.open(folder)
    DitEngine(checkpoint, CPU, DitSettings())
    ArEngine(checkpoint, CPU, ArSettings(max_num_seqs=1, max_sequence_tokens=8)).close()


@pytest.fixture
def folder(checkpoint_folder: Path, tmp_path: Path) -> Path:
    """A complete checkpoint for a test to damage."""
    return shutil.copytree(checkpoint_folder, tmp_path / "damaged")


@pytest.fixture
def sharded(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    return shutil.copytree(make_checkpoint(max_shard_size=200_000), tmp_path / "sharded")


def refused(folder: Path, *parts: str) -> str:
    with pytest.raises(CheckpointError) as error:
        load(folder)
    message = str(error.value)
    assert str(folder) in message
    for part in parts:
        assert part in message
    return message


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


AR = "vision_language_encoder/model.safetensors"
DIT = "transformer/diffusion_pytorch_model.safetensors"
QUERY = "model.language_model.layers.1.self_attn.q_proj.weight"


def test_a_complete_checkpoint_loads(folder: Path, sharded: Path) -> None:
    load(folder)
    load(sharded)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "model_index.json", "no such file")


@pytest.mark.parametrize("missing", ["model_index.json", *(f"{name}/{file}" for name, (_, file) in COMPONENTS.items())])
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    refused(folder, missing)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_missing_component_is_named(folder: Path, component: str) -> None:
    shutil.rmtree(folder / component)
    refused(folder, component)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", None, 3])
def test_the_folder_of_another_model_is_refused(folder: Path, name: object) -> None:
    change_json(folder / "model_index.json", lambda index: index.update(_class_name=name))
    refused(folder, "model_index.json", repr(name), "GlmImagePipeline")


@pytest.mark.parametrize("entry", [["diffusers", "FluxTransformer2DModel"], None, [], "text", 7, ["one"], {"a": 1}])
def test_a_component_of_another_class_is_refused(folder: Path, entry: object) -> None:
    change_json(folder / "model_index.json", lambda index: index.update(transformer=entry))
    refused(folder, "model_index.json", "transformer", "GlmImageTransformer2DModel")


@pytest.mark.parametrize("file", ["model_index.json", "vision_language_encoder/config.json", "vae/config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"\0" * 64, b"[" * 100_000, b"1e999"])
def test_malformed_json_is_refused(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    refused(folder, file)


@pytest.mark.parametrize(
    "weights", [AR, DIT, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
)
def test_missing_or_truncated_weights_are_named(folder: Path, weights: str) -> None:
    whole = (folder / weights).read_bytes()
    for kept in (4, 1000, len(whole) - 1):
        (folder / weights).write_bytes(whole[:kept])
        refused(folder, weights)
    (folder / weights).unlink()
    refused(folder, str(Path(weights).parent), Path(weights).name)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder / AR, lambda tensors: tensors.pop(QUERY))
    refused(folder, "vision_language_encoder", QUERY, "missing")


@pytest.mark.parametrize(
    ("weights", "name"),
    [(AR, QUERY), (AR, "lm_head.weight"), (DIT, "proj_out.bias"), (DIT, "prior_token_embedding.weight")],
)
def test_a_tensor_of_another_shape_is_named(folder: Path, weights: str, name: str) -> None:
    change_tensors(folder / weights, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    refused(folder, weights, name, "shape")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shards = sorted((sharded / "transformer").glob("*.safetensors"))
    shards[1].unlink()
    refused(sharded, shards[1].name)


def test_an_index_that_disagrees_with_its_shards_is_refused(sharded: Path) -> None:
    index = sharded / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    shards = sorted({*json.loads(index.read_text())["weight_map"].values()})
    name = "proj_out.weight"
    held = json.loads(index.read_text())["weight_map"][name]
    other = next(shard for shard in shards if shard != held)
    change_json(index, lambda content: content["weight_map"].update({name: other}))
    refused(sharded, other, name)
    change_json(index, lambda content: content["weight_map"].pop(name))
    refused(sharded, "transformer", name)


@pytest.mark.parametrize("weight_map", [None, [], "text", {"proj_out.weight": 3}, {}])
def test_a_malformed_index_is_refused(sharded: Path, weight_map: object) -> None:
    index = sharded / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    change_json(index, lambda content: content.update(weight_map=weight_map))
    refused(sharded, "transformer")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda config: config.pop("text_config"), "text_config"),
        (lambda config: config["text_config"].pop("num_hidden_layers"), "num_hidden_layers"),
        (lambda config: config["text_config"].update(hidden_act="gelu"), "hidden_act"),
        (lambda config: config["text_config"]["rope_parameters"].update(rope_type="yarn"), "rope_type"),
        (lambda config: config["text_config"]["rope_parameters"].update(mrope_section=[8, 12, 12]), "mrope_section"),
        (lambda config: config.update(text_config=[]), "config.json"),
        (lambda config: config["text_config"].update(rope_parameters=None), "config.json"),
        (lambda config: config["text_config"].update(hidden_size="wide"), "config.json"),
    ],
)
def test_an_unsupported_decoder_config_is_refused(folder: Path, change: Callable[[Any], object], part: str) -> None:
    change_json(folder / "vision_language_encoder" / "config.json", change)
    refused(folder, "vision_language_encoder", part)


def test_sampling_defaults_are_those_of_the_checkpoint(make_checkpoint: MakeCheckpoint, folder: Path) -> None:
    own = ArConfig.read(Checkpoint.open(make_checkpoint(weights=False, temperature=0.5, top_p=0.25)))
    assert (own.sampling.temperature, own.sampling.top_p, own.sampling.top_k) == (0.5, 0.25, own.vision_vocab_size)
    (folder / "vision_language_encoder" / "generation_config.json").unlink()
    config = ArConfig.read(Checkpoint.open(folder))
    sampling = config.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.9, 0.75, config.vision_vocab_size)
    assert config.end_ids == (config.codebook_size + 1,)


def test_null_sampling_values_have_the_defaults_and_a_top_k_of_0_is_no_limit(folder: Path) -> None:
    file = folder / "vision_language_encoder" / "generation_config.json"
    for top_k in (None, 0):
        values = {"temperature": None, "top_p": None, "top_k": top_k}
        change_json(file, lambda content, values=values: content.update(values))
        config = ArConfig.read(Checkpoint.open(folder))
        assert vars(config.sampling) == {"temperature": 0.9, "top_p": 0.75, "top_k": config.vision_vocab_size}


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", 0, "temperature is 0; allowed: 0.01 to 2"),
        ("top_p", 0.0, "top_p is 0.0; allowed: above 0"),
        ("top_k", -1, "top_k is -1; allowed: 1"),
    ],
)
def test_a_sampling_value_of_0_is_not_taken_for_a_missing_one(
    folder: Path, name: str, value: float, allowed: str
) -> None:
    file = folder / "vision_language_encoder" / "generation_config.json"
    change_json(file, lambda content: content.update({name: value}))
    refused(folder, f"in generation_config.json, {allowed}")


@pytest.mark.parametrize("name", ["num_attention_heads", "num_key_value_heads", "head_dim"])
def test_a_count_of_0_is_not_taken_for_a_missing_one(folder: Path, name: str) -> None:
    file = folder / "vision_language_encoder" / "config.json"
    change_json(file, lambda config: config["text_config"].update({name: 0}))
    refused(folder, f"text_config.{name} is 0; allowed: a whole number from 1")


def test_a_checkpoint_without_defaults_has_those_of_the_published_model(folder: Path) -> None:
    (folder / "generation_defaults.json").write_text('{"height": 256, "num_inference_steps": 20}')
    own = {"width": 1024, "height": 256, "num_inference_steps": 20, "guidance_scale": 1.5}
    assert Checkpoint.open(folder).defaults == own
    (folder / "generation_defaults.json").unlink()
    published = {"width": 1024, "height": 1024, "num_inference_steps": 50, "guidance_scale": 1.5}
    assert Checkpoint.open(folder).defaults == published


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"width": 0}', "width is 0; allowed: 32 to 2048"),
        ('{"steps": 3}', "steps is not known; allowed: width, height"),
        ('{"width": "wide"}', "generation_defaults.json"),
        ('{"width": 256.5}', "generation_defaults.json"),
        ("[]", "generation_defaults.json"),
        ("{", "generation_defaults.json"),
    ],
)
def test_malformed_defaults_are_refused(folder: Path, content: str, message: str) -> None:
    (folder / "generation_defaults.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        _ = Checkpoint.open(folder).defaults


def test_name_and_revision(folder: Path, tmp_path: Path) -> None:
    revision = Checkpoint.open(folder).revision
    assert Checkpoint.open(folder).name == "damaged"
    assert len(revision) == 12
    assert Checkpoint.open(shutil.copytree(folder, tmp_path / "copy")).revision == revision
    known = {revision}
    for file in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(file)
        largest = max(tensors, key=lambda name: tensors[name].numel())
        save_file(tensors | {largest: tensors[largest] + 1.0}, file)
        known.add(Checkpoint.open(folder).revision)
    assert len(known) == 5, "retrained weights of each part change the revision"
    change_json(folder / "vae" / "config.json", lambda config: config.update(scaling_factor=2.0))
    assert Checkpoint.open(folder).revision not in known
    hub = tmp_path / "models--an-owner--a-model" / "snapshots" / "0123abc"
    shutil.copytree(folder, hub)
    assert (Checkpoint.open(hub).name, Checkpoint.open(hub).revision) == ("an-owner/a-model", "0123abc")
