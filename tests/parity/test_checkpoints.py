"""Checkpoints of other sizes, types and files: every number comes from the checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from glm_image.ar.settings import ArSettings
from glm_image.pipeline import LocalPipeline, LocalSettings, paint_request
from glm_image.request.parameters import GenerationParameters
from helpers import MakeCheckpoint
from make_tiny_checkpoint import TinyConfig
from parity.reference import load_reference, reference_image, reference_tokens

OTHERS = {
    "three layers, grouped heads of another width": TinyConfig(
        seed=1, ar_layers=3, ar_hidden=48, ar_heads=6, ar_kv_heads=3, ar_head_dim=12, ar_ffn=50, ar_rope_theta=500.0,
        dit_layers=3, dit_heads=5, dit_head_dim=12, dit_time_dim=24, dit_condition_dim=10,
    ),
    "other ids, one kv head, other sampling": TinyConfig(
        seed=2, codebook=100, reserved_ids=0, unused_ids=37, trailing_ids=0, ar_layers=1, ar_hidden=64, ar_heads=2,
        ar_kv_heads=1, temperature=0.7, top_p=0.9, chat_prefix="[gMASK]<sop><|user|>\n",
    ),
    "bf16 in shards with an index": TinyConfig(seed=3, dtype="bfloat16", max_shard_size=150_000, codebook=512),
    "other latents, VAE and glyph encoder": TinyConfig(
        seed=4, latent_stats_seed=7, latent_channels=4, vae_widths=(8, 16, 24, 24), vae_norm_groups=4, vae_layers=2,
        glyph_d_model=40, glyph_layers=1, glyph_heads=3, glyph_head_dim=8, glyph_ffn=36, chat_prefix="Draw: ",
        dit_layers=1, dit_heads=1, dit_head_dim=32,
    ),
}  # fmt: skip
SMALL = LocalSettings(ar=ArSettings(max_sequence_tokens=640, max_num_seqs=2))


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_another_checkpoint_gives_the_references_tokens_and_pixels(
    make_checkpoint: MakeCheckpoint, config: TinyConfig
) -> None:
    folder = make_checkpoint(**asdict(config))
    reference = load_reference(folder)
    with LocalPipeline(folder, "cpu", SMALL) as pipeline:
        for prompt, height, width, seed in (("a fox and 'ABC'", 64, 96, 5), ("'一' \"2\" it's", 160, 32, -9)):
            values = GenerationParameters(
                prompt=prompt, height=height, width=width, seed=seed, num_inference_steps=3, guidance_scale=2.5
            )
            resolved = pipeline.resolve(values)
            prior = pipeline.prior(resolved)
            theirs = reference_tokens(reference, prompt, height, width, seed)
            assert prior.prior_token_ids[0].tolist() == theirs.tolist()
            picture = pipeline.paint(paint_request(resolved, prior, {})).pixels[0]
            their_picture = reference_image(reference, prompt, height, width, seed, 3, 2.5, theirs)
            assert np.abs(picture.astype(int) - their_picture).max() == 0


def test_the_sharded_checkpoint_has_several_bf16_shards(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(**asdict(OTHERS["bf16 in shards with an index"]))
    for component in ("vision_language_encoder", "transformer", "vae"):
        (index,) = (folder / component).glob("*.index.json")
        shards = set(json.loads(index.read_text())["weight_map"].values())
        assert len(shards) > 1
        with safe_open(folder / component / min(shards), "pt") as opened:
            assert {str(opened.get_tensor(name).dtype) for name in opened.keys()} == {"torch.bfloat16"}  # noqa: SIM118


def test_random_weights_need_no_files(make_checkpoint: MakeCheckpoint) -> None:
    folder: Path = make_checkpoint(weights=False)
    assert not list(folder.rglob("*.safetensors*"))
    values = GenerationParameters(prompt="a 'fox'", height=64, width=64, seed=1, num_inference_steps=2)
    made = []
    for _ in range(2):
        with LocalPipeline(folder, "cpu", LocalSettings(ar=SMALL.ar, load_format="dummy")) as pipeline:
            made.append(pipeline.generate(values).pixels)
            assert pipeline.prior(pipeline.resolve(values)).prior_token_ids.max() < pipeline.dit.codebook_size
    assert np.array_equal(*made)
    assert made[0].std() > 1
