from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, GlmImagePipeline, GlmImageTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from transformers import GlmImageForConditionalGeneration, GlmImageProcessor, T5EncoderModel

from make_tiny_checkpoint import FULL, PARTS, Part, TinyConfig, main, make_tiny_checkpoint, parse_size, part_shapes
from parity.reference import load_reference, reference_generation, reference_image, reference_tokens

CLASSES = {
    "vision_language_encoder": GlmImageForConditionalGeneration,
    "text_encoder": T5EncoderModel,
    "transformer": GlmImageTransformer2DModel,
    "vae": AutoencoderKL,
}
ODD = [
    TinyConfig(seed=1, ar_hidden=48, ar_heads=6, ar_kv_heads=3, ar_head_dim=12, ar_ffn=50, ar_layers=1),
    TinyConfig(codebook=100, reserved_ids=0, unused_ids=37, trailing_ids=0, ar_layers=3, ar_hidden=64, ar_heads=2,
               ar_kv_heads=1, dit_layers=1, dit_heads=1, dit_head_dim=32, dit_time_dim=24, dit_condition_dim=10),
    TinyConfig(dit_layers=3, dit_heads=5, dit_head_dim=12, latent_channels=4, vae_widths=(8, 16, 24, 24),
               vae_norm_groups=4, vae_layers=2),
    TinyConfig(glyph_d_model=40, glyph_layers=1, glyph_heads=3, glyph_head_dim=8, glyph_ffn=36, vision_depth=1,
               vision_hidden=24, vision_heads=3, vision_ffn=40, vision_image_size=128, vq_dim=20),
    TinyConfig(latent_stats_seed=7, latent_channels=12, chat_prefix="[gMASK]<|user|>", temperature=0.7, top_p=0.9,
               ar_rope_theta=500.0, dtype="bfloat16", max_shard_size=300_000),
]  # fmt: skip


@pytest.fixture(scope="session")
def folder(checkpoint_folder: Path) -> Path:
    return checkpoint_folder


def digests(folder: Path) -> dict[str, str]:
    files = (f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {f"{file.parent.name}/{name}": opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def difference(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> float:
    return float(np.abs(left.astype(int) - right.astype(int)).mean())


def test_two_runs_write_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = digests(make_tiny_checkpoint(tmp_path / "again"))
    assert again == digests(folder)
    reseeded = digests(make_tiny_checkpoint(tmp_path / "reseeded", TinyConfig(seed=1)))
    assert {name for name in again if again[name] != reseeded[name]} == {n for n in again if "safetensors" in n}
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 4_500_000


def test_no_file_names_a_library_version(folder: Path) -> None:
    for file in folder.rglob("*.json"):
        assert not {"transformers_version", "_diffusers_version", "torch_version"} & json.loads(file.read_text()).keys()


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.folder)
def test_files_hold_exactly_the_tensors_of_the_module(folder: Path, part: Part) -> None:
    module, info = CLASSES[part.folder].from_pretrained(folder / part.folder, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_shards_and_dtype_change_files_but_not_the_model(folder: Path, tmp_path: Path) -> None:
    sharded = make_tiny_checkpoint(tmp_path / "sharded", TinyConfig(max_shard_size=200_000))
    for part in PARTS[2:]:
        index = json.loads((sharded / part.folder / f"{part.stem}.safetensors.index.json").read_text())
        files = {file.name for file in (sharded / part.folder).glob("*.safetensors")}
        assert len(files) > 2
        assert set(index["weight_map"].values()) == files
        assert index["weight_map"].keys() == part_shapes(part, TinyConfig()).keys()
    whole, split = tensors(folder), tensors(sharded)
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)
    half = tensors(make_tiny_checkpoint(tmp_path / "half", TinyConfig(dtype="bfloat16")))
    assert all(torch.equal(whole[name].to(torch.bfloat16), half[name]) for name in whole)
    # Not their images: the memory alignment of a file's tensors may change the rounding of products.
    whole, split = (load_reference(f) for f in (folder, sharded))
    for part in PARTS:
        loaded, again = (getattr(pipe, part.folder).state_dict() for pipe in (whole, split))
        assert loaded.keys() == again.keys()
        assert all(torch.equal(loaded[name], again[name]) for name in loaded)


@pytest.mark.parametrize("config", ODD, ids=range(len(ODD)))
def test_other_sizes_run_in_the_reference(config: TinyConfig, tmp_path: Path) -> None:
    pipe = load_reference(make_tiny_checkpoint(tmp_path / "odd", config))
    for height, width in ((64, 64), (96, 32)):
        tokens = reference_tokens(pipe, "a fox and 'ABC'", height, width, seed=5)
        assert tokens.shape == (height * width // 1024,)
        assert tokens.max() < config.codebook
        image = reference_image(pipe, "a fox and 'ABC'", height, width, 5, 2, 1.5, tokens)
        assert image.shape == (height, width, 3)
        assert image.std() > 10


def test_full_preset_has_the_sizes_and_ids_of_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    main([str(folder), "--preset", "full", "--weights", "none"])
    assert not list(folder.rglob("*.safetensors*"))
    counts = {p.folder: sum(math.prod(shape) for shape in part_shapes(p, FULL).values()) for p in PARTS}
    assert counts["transformer"] == 6_926_882_880
    assert counts["text_encoder"] == 217_657_472
    assert counts["vae"] == 406_100_643
    ar = part_shapes(PARTS[0], FULL)
    text = sum(math.prod(shape) for name, shape in ar.items() if name.startswith("model.language_model."))
    assert text == 8_847_155_200
    assert round((counts["vision_language_encoder"] - text) / 1e9, 2) == 1.27
    config = json.loads((folder / "vision_language_encoder" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == 168064
    assert config["text_config"]["vision_vocab_size"] == 16512
    assert config["text_config"]["rope_parameters"]["mrope_section"] == [8, 12, 12]
    assert "head_dim" not in config["text_config"]
    processor = GlmImageProcessor.from_pretrained(folder / "processor")
    names = ["<|dit_token_16384|>", "<|dit_token_16385|>", "<|endoftext|>", "<sop>", "<eop>", "<|image|>"]
    ids = [16384, 16385, 167841, 167845, 167846, 167855]
    assert processor.tokenizer.convert_tokens_to_ids(names) == ids
    configured = [config[f"image_{which}_id"] for which in ("start_token", "end_token", "token")]
    assert configured == [16384, 16385, 167855]
    assert (config["text_config"]["eos_token_id"], config["text_config"]["pad_token_id"]) == (16385, 167841)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "ab"}]}],
        tokenize=True, return_dict=True, return_tensors="pt", target_h=1024, target_w=1024,
    )  # fmt: skip
    assert inputs["input_ids"][0].tolist()[-1] == 16384
    assert inputs["image_grid_thw"].tolist() == [[1, 32, 32], [1, 16, 16]]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60).filter(lambda text: "<" not in text and "[" not in text))
def test_tokenizer_is_one_token_a_byte(folder: Path, text: str) -> None:
    tokenizer = load_reference(folder).processor.tokenizer
    first = TinyConfig().vision_vocab
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert all(first <= i < first + 256 for i in ids)
    assert tokenizer.decode(ids) == text


def test_special_tokens_and_image_markers(folder: Path) -> None:
    c = TinyConfig()
    processor = load_reference(folder).processor
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 640, 3), dtype=np.uint8))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "x"}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        tokenize=True, return_dict=True, return_tensors="pt", target_h=64, target_w=96,
    )  # fmt: skip
    ids = inputs["input_ids"][0].tolist()
    grid = inputs["image_grid_thw"].tolist()
    assert grid == [[1, 16, 20], [1, 2, 3]]
    image_id = c.first_special + 14
    assert ids[:322] == [c.codebook, *[image_id] * 320, c.codebook + 1]
    sop, eop = c.first_special + 4, c.first_special + 5
    written = [c.vision_vocab + byte for byte in b"x"], [c.vision_vocab + byte for byte in b"2 3"]
    assert ids[322:] == [*written[0], sop, *written[1], eop, c.codebook]


def test_image_to_image_depends_on_its_source(folder: Path) -> None:
    pipe = load_reference(folder)
    images = []
    for seed in (0, 1):
        source = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(source).resize((512, 512), Image.Resampling.BICUBIC)
        generator = torch.Generator().manual_seed(0)
        made = pipe(prompt="x", image=[image], height=64, width=64, num_inference_steps=2, generator=generator)
        images.append(np.array(made.images[0]))
    assert difference(*images) > 0.5


def test_tokens_and_images_vary_without_saturating(folder: Path) -> None:
    pipe = load_reference(folder)
    fox, foxes, whale = "a red fox says 'NEWS'", "a red fox says 'NEWT'", "a blue whale"
    made = {(p, s): reference_generation(pipe, p, 256, 256, s) for p, s in ((fox, 0), (fox, 1), (whale, 0))}
    assert {len(ids) for ids in made.values()} == {16 * 16 + 8 * 8 + 1}
    for other in ((fox, 1), (whale, 0)):
        assert (made[fox, 0] != made[other]).mean() > 0.25
    assert len(set(made[fox, 0].tolist())) > 80
    assert max(ids.max() for ids in made.values()) < TinyConfig().codebook
    tokens = reference_tokens(pipe, fox, 128, 128, 0)
    image = reference_image(pipe, fox, 128, 128, 0, 8, 1.5, tokens)
    assert image.reshape(-1, 3).std(axis=0).min() > 20
    assert np.isin(image, (0, 255)).mean() < 0.05
    variants = {
        "glyphs": reference_image(pipe, foxes, 128, 128, 0, 8, 1.5, tokens),
        "noise": reference_image(pipe, fox, 128, 128, 1, 8, 1.5, tokens),
        "prior": reference_image(pipe, fox, 128, 128, 0, 8, 1.5, (tokens + 1) % 256),
        "guidance": reference_image(pipe, fox, 128, 128, 0, 8, 4.0, tokens),
        "steps": reference_image(pipe, fox, 128, 128, 0, 3, 1.5, tokens),
    }
    assert {name: difference(image, other) > 0.4 for name, other in variants.items()} == dict.fromkeys(variants, True)


def test_ids_beyond_the_codes_can_be_allowed(folder: Path, tmp_path: Path) -> None:
    loose = TinyConfig(reserved_logit=0.0, codebook=16, reserved_ids=200)
    generated = reference_generation(load_reference(make_tiny_checkpoint(tmp_path / "loose", loose)), "x", 64, 64, 0)
    assert generated.max() >= loose.codebook


def test_reference_calls_are_independent(folder: Path) -> None:
    fresh = GlmImagePipeline.from_pretrained(folder, dtype=torch.float32)
    fresh.set_progress_bar_config(disable=True)
    pipe = load_reference(folder)
    assert pipe is load_reference(folder)
    alone = reference_image(fresh, "a 'fox'", 64, 96, 4, 2, 1.5)
    before = pipe.vision_language_encoder.generation_config.to_dict()
    state = torch.random.get_rng_state()
    greedy = [reference_tokens(pipe, "b", 96, 96, seed, top_k=1, temperature=0.5, top_p=0.9) for seed in (0, 1)]
    assert np.array_equal(*greedy)
    assert pipe.vision_language_encoder.generation_config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)
    sampled = [reference_tokens(pipe, "b", 96, 96, seed) for seed in (0, 1)]
    assert not np.array_equal(*sampled)
    assert np.array_equal(reference_image(pipe, "a 'fox'", 64, 96, 4, 2, 1.5), alone)
    tokens = reference_tokens(pipe, "a 'fox'", 64, 96, 4)
    assert np.array_equal(tokens, reference_generation(pipe, "a 'fox'", 64, 96, 4)[-7:-1])
    assert np.array_equal(reference_image(pipe, "a 'fox'", 64, 96, 4, 2, 1.5, tokens), alone)


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        make_tiny_checkpoint(tmp_path)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("mine", "kept")]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "made" / "here"
    main([str(target), "--ar-layers", "1", "--vae-widths", "8,8,16,16", "--max-shard-size", "100KB", "--seed", "3"])
    config = TinyConfig(ar_layers=1, vae_widths=(8, 8, 16, 16), max_shard_size=100_000, seed=3)
    assert digests(target) == digests(make_tiny_checkpoint(tmp_path / "called", config))
    assert str(target) in capsys.readouterr().out
    for wrong in (["--dtype", "int8"], ["--vae-widths", "8,8"], ["--ar-kv-heads", "3"], ["--max-shard-size", "1XB"]):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "refused"), *wrong])
    assert not (tmp_path / "refused").exists()
    assert [parse_size(text) for text in ("7", "500KB", "2MiB", "5 GB")] == [7, 500_000, 2 * 2**20, 5 * 10**9]
