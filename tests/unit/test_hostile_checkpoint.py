"""Checkpoints that would hang a server, fill its memory, lead out of their folder or spoil its images."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GlmImageProcessor

from glm_image.ar.config import ArConfig
from glm_image.ar.engine import ArEngine
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint import checkpoint as checkpoint_module
from glm_image.checkpoint.bounds import LARGEST_SIZE, MOST_LAYERS
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.checkpoint.files import MAX_JSON_BYTES, MAX_TOKENIZER_BYTES
from glm_image.checkpoint.layout import COMPONENTS
from glm_image.devices.open import open_device
from glm_image.dit.engine import DitEngine
from glm_image.dit.settings import DitSettings
from glm_image.errors import CheckpointError
from glm_image.request import chat_template
from glm_image.request.prompts import PromptTokenizer
from glm_image.sizing.inspect import inspect
from helpers import MakeCheckpoint

CPU = open_device("cpu")
AR, DIT = "vision_language_encoder", "transformer"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"

Change = Callable[[Any], object]


@pytest.fixture
def folder(checkpoint_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint_folder, tmp_path / "hostile")


def change_json(path: Path, change: Change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(action: Callable[[], object], *parts: str) -> None:
    with pytest.raises(CheckpointError) as error:
        action()
    for part in parts:
        assert part in str(error.value)


def with_negative_section(rope: dict[str, Any]) -> None:
    rope["mrope_section"] = [-1, sum(rope["mrope_section"]) + 1]


class TestFiles:
    @pytest.mark.parametrize(
        "name",
        ["model_index.json", f"{AR}/config.json", f"{AR}/generation_config.json", "processor/tokenizer.json",
         "processor/chat_template.jinja", "vae/diffusion_pytorch_model.safetensors", "processor/unknown"],
    )  # fmt: skip
    def test_a_named_pipe_is_refused(self, folder: Path, name: str) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        refused(lambda: Checkpoint.open(folder), str(folder / name), "named pipe", "regular file")

    def test_a_device_and_a_folder_are_refused(self, folder: Path) -> None:
        config = folder / "vae" / "config.json"
        config.unlink()
        config.symlink_to("/dev/zero")
        refused(lambda: Checkpoint.open(folder), str(config), "a device")
        config.unlink()
        config.mkdir()
        refused(lambda: Checkpoint.open(folder), str(config), "a folder")

    def test_a_link_to_a_file_is_followed_and_one_to_a_folder_is_not(self, folder: Path, tmp_path: Path) -> None:
        blob = (folder / "vae" / "config.json").rename(tmp_path / "blob")
        (folder / "vae" / "config.json").symlink_to(blob)
        Checkpoint.open(folder)
        (folder / "processor" / "additional_chat_templates").symlink_to(tmp_path)
        refused(lambda: Checkpoint.open(folder), "additional_chat_templates", "a link to a folder")

    def test_json_is_bounded(self, folder: Path) -> None:
        config = folder / "vae" / "config.json"
        config.write_text(config.read_text() + " " * MAX_JSON_BYTES)
        refused(lambda: Checkpoint.open(folder), str(config), f"{MAX_JSON_BYTES:,}")

    def test_what_libraries_read_is_bounded(self, folder: Path) -> None:
        tokenizer = folder / "processor" / "tokenizer.json"
        os.truncate(tokenizer, MAX_TOKENIZER_BYTES + 1)
        refused(lambda: Checkpoint.open(folder), str(tokenizer), f"{MAX_TOKENIZER_BYTES:,}")

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
    def test_numbers_are_finite(self, folder: Path, number: str) -> None:
        config = folder / "vae" / "config.json"
        config.write_text(config.read_text().replace('"scaling_factor": 1.0', f'"scaling_factor": {number}'))
        refused(lambda: Checkpoint.open(folder), str(config), number, "finite")

    @pytest.mark.parametrize(
        "name", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "", ".", "a\0", "x.bin"]
    )
    def test_an_index_stays_in_its_folder(self, folder: Path, name: str) -> None:
        (folder / INDEX).write_text(json.dumps({"weight_map": {"proj_out.weight": name}}))
        refused(lambda: Checkpoint.open(folder), INDEX, "weight_map")
        refused(lambda: inspect(folder), INDEX, "weight_map")

    def test_the_revision_reads_little_of_a_stray_file(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        revision = Checkpoint.open(folder).revision
        stray = folder / "model.gguf"
        stray.touch()
        os.truncate(stray, 6 * 10**9)
        read: list[Path] = []
        whole = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or whole(path))
        assert Checkpoint.open(folder).revision != revision
        assert read
        assert stray not in read


class TestNumbers:
    @pytest.mark.parametrize(
        ("component", "field", "value", "part"),
        [
            (AR, "text_config.num_hidden_layers", 10**9, "by the tensors"),
            (AR, "text_config.num_hidden_layers", True, "by the tensors"),
            (AR, "text_config.head_dim", 0, "from 1"),
            (AR, "text_config.hidden_size", 2**62, str(LARGEST_SIZE)),
            (AR, "text_config.rms_norm_eps", 0, "above 0"),
            (AR, "vision_config.depth", 10**9, "by the tensors"),
            (AR, "vision_config.patch_size", 0, "from 1"),
            (AR, "vq_config.num_embeddings", -1, "from 1"),
            ("text_encoder", "num_layers", 10**9, "by the tensors"),
            ("text_encoder", "num_heads", 0, "from 1"),
            (DIT, "num_layers", 10**9, "by the tensors"),
            (DIT, "attention_head_dim", "64", "a whole number"),
            ("vae", "layers_per_block", 10**9, "by the tensors"),
            ("vae", "block_out_channels", [8] * 10**5, "by the tensors"),
            ("vae", "norm_num_groups", 0, "from 1"),
            ("vae", "scaling_factor", 0, "above 0"),
            ("vae", "latents_std", [1.0] * 15 + [0.0], "16 numbers above 0"),
            ("vae", "latents_mean", [1.0] * 15, "a list of 16"),
            ("scheduler", "num_train_timesteps", 10**9, "from 1"),
            ("scheduler", "base_image_seq_len", 0, "from 1"),
        ],
    )
    def test_a_size_out_of_bounds_is_named(
        self, folder: Path, component: str, field: str, value: object, part: str
    ) -> None:
        path = folder / component / COMPONENTS[component][1]
        *parents, last = field.split(".")
        change_json(path, lambda config: reduce(getitem, parents, config).update({last: value}))
        refused(lambda: Checkpoint.open(folder), str(path), f"{field} is ", part)

    def test_without_tensors_the_number_of_layers_is_bounded(self, folder: Path) -> None:
        change_json(folder / DIT / "config.json", lambda config: config.update(num_layers=10**9))
        refused(lambda: Checkpoint.open(folder, "dummy"), "num_layers", str(MOST_LAYERS))
        refused(lambda: inspect(folder), "num_layers", str(MOST_LAYERS))

    @pytest.mark.parametrize(
        ("file", "change", "part"),
        [
            ("config.json", lambda c: c["text_config"].update(hidden_size=2, head_dim=None), "head_dim is 0"),
            ("config.json", lambda c: c["text_config"].update(num_key_value_heads=3), "num_key_value_heads is 3"),
            ("config.json", lambda c: with_negative_section(c["text_config"]["rope_parameters"]), "mrope_section (-1"),
            ("generation_config.json", lambda c: c.update(temperature=-1), "temperature is -1"),
            ("generation_config.json", lambda c: c.update(top_p="all"), "generation_config.json"),
        ],
    )  # fmt: skip
    def test_a_decoder_that_cannot_run_is_refused(self, folder: Path, file: str, change: Change, part: str) -> None:
        change_json(folder / AR / file, change)
        refused(lambda: ArConfig.read(Checkpoint.open(folder)), str(folder / AR), part)

    @pytest.mark.parametrize(
        ("component", "file", "change"),
        [
            ("scheduler", "scheduler_config.json", lambda c: c.update(base_shift=-1e30)),
            ("scheduler", "scheduler_config.json", lambda c: c.update(time_shift_type="none")),
            ("vae", "config.json", lambda c: c.update(down_block_types=["Nothing"] * 4)),
            ("text_encoder", "config.json", lambda c: c.update(feed_forward_proj="a-b-c")),
            (DIT, "config.json", lambda c: c.update(patch_size=[2])),
        ],
    )
    def test_a_config_of_which_nothing_can_be_made_is_named(
        self, folder: Path, component: str, file: str, change: Change
    ) -> None:
        change_json(folder / component / file, change)
        refused(lambda: DitEngine(Checkpoint.open(folder), CPU, DitSettings()), str(folder / component / file))

    def test_a_processor_that_cannot_be_read_is_named(self, folder: Path) -> None:
        (folder / "processor" / "tokenizer.json").write_text("{")
        refused(lambda: Checkpoint.open(folder).processor, str(folder / "processor"), "cannot be used")
        change_json(folder / "processor" / "preprocessor_config.json", lambda c: c["size"].update(longest_edge=10**18))
        refused(lambda: Checkpoint.open(folder).source_rule, "to 1000000000; allowed")


class TestWeights:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize(
        ("file", "name"),
        [(f"{AR}/model.safetensors", "model.language_model.layers.1.mlp.down_proj.weight"),
         ("transformer/diffusion_pytorch_model.safetensors", "proj_out.bias")],
    )  # fmt: skip
    def test_weights_that_are_not_finite_are_named(
        self, folder: Path, file: str, name: str, value: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checkpoint_module, "CHECKED_VALUES", 7)  # the last of several pieces
        tensors = load_file(folder / file)
        tensors[name].flatten()[-1] = value
        save_file(tensors, folder / file)
        source = Checkpoint.open(folder).tensors(file.split("/", maxsplit=1)[0], torch.device("cpu"), torch.float32)
        refused(lambda: source.read(name, tuple(tensors[name].shape)), str(folder / file), name, "not a number")

    def test_large_numbers_whose_sum_overflows_are_not_refused(self, folder: Path) -> None:
        file = folder / "vae" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        name = max(tensors, key=lambda name: tensors[name].numel())
        tensors[name].fill_(3e38)
        save_file(tensors, file)
        source = Checkpoint.open(folder).tensors("vae", torch.device("cpu"), torch.float32)
        assert torch.equal(source.read(name, tuple(tensors[name].shape)), tensors[name])

    def test_both_stages_refuse_them(self, folder: Path) -> None:
        for file in (folder / "vae" / "diffusion_pytorch_model.safetensors", folder / AR / "model.safetensors"):
            tensors = load_file(file)
            name = min(tensors)
            tensors[name].flatten()[0] = float("nan")
            save_file(tensors, file)
        refused(lambda: DitEngine(Checkpoint.open(folder), CPU, DitSettings()), "vae", "not a number")
        refused(lambda: ArEngine(Checkpoint.open(folder), CPU, ArSettings(max_num_seqs=1)), AR, "not a number")

    def test_a_number_that_the_dtype_cannot_hold_is_named(self, folder: Path) -> None:
        file = folder / "vae" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        name = min(tensors)
        tensors[name].flatten()[0] = 1e5
        save_file(tensors, file)
        checkpoint, shape = Checkpoint.open(folder), tuple(tensors[name].shape)
        checkpoint.tensors("vae", torch.device("cpu"), torch.bfloat16).read(name, shape)
        half = checkpoint.tensors("vae", torch.device("cpu"), torch.float16)
        refused(lambda: half.read(name, shape), name, "float16")


class TestChatTemplate:
    @pytest.fixture
    def tokenizer(self, make_checkpoint: MakeCheckpoint) -> PromptTokenizer:
        return PromptTokenizer(GlmImageProcessor.from_pretrained(make_checkpoint(weights=False) / "processor"))

    @pytest.mark.parametrize(
        ("template", "part"),
        [
            ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "CPU time"),
            ("{{ ('a' * 1000000000) | length }}", "memory"),
            ("{% for i in range(99999) %}{{ 'ab' }}{% endfor %}", "characters"),
            ("{{ ''.__class__.__mro__ }}", "SecurityError"),
            ("{% for", "TemplateSyntaxError"),
            ("{{ raise_exception('no') }}", "no"),
        ],
    )
    def test_a_hostile_template_is_refused(
        self, tokenizer: PromptTokenizer, template: str, part: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
        monkeypatch.setattr(tokenizer.processor, "chat_template", template)
        refused(lambda: tokenizer._template(0), "processor/chat_template", part)

    def test_what_a_template_may_use(self, tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        template = (
            "{% for m in messages %}\n  {% for part in m.content %}\n{% if part.type == 'image' %}{% continue %}\n"
            "{% endif %}{{ part | tojson }}{{ bos_token }}{{ tools }}{% endfor %}{% endfor %}"
            "{% if add_generation_prompt %}x{% endif %}"
        )
        monkeypatch.setattr(tokenizer.processor, "chat_template", {"default": template})
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "ä"}]}
        theirs = tokenizer.processor.apply_chat_template([message], tokenize=False)
        variables = tokenizer.processor.tokenizer.special_tokens_map
        assert chat_template.render(template, [[message]], variables) == [theirs]

    def test_all_numbers_of_images_are_rendered_by_one_process(
        self, tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokenizer._template(0)
        monkeypatch.setattr(chat_template, "render", lambda *_: pytest.fail("rendered again"))
        assert [tokenizer._template(images)[0].count("<|image|>") for images in range(5)] == list(range(5))

    def test_a_missing_template_is_named(self, tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        for missing in (None, {}, {"default": 3}):
            monkeypatch.setattr(tokenizer.processor, "chat_template", missing)
            refused(lambda: tokenizer._template(0), "processor/chat_template", "missing")
