"""Training computes what inference computes."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from torch import Tensor, nn
from transformers import ByT5Tokenizer

import tiny_checkpoint_configs as configs
from glm_image.dit.schedule import schedule
from glm_image.request import geometry, prompts
from glm_image.request.geometry import Grid, PlacedGrid, Size
from glm_image.request.prompts import PromptTokenizer
from train_tiny import loop, models
from train_tiny.autoencoder import sheets
from train_tiny.cells import HELD_WEIGHT, SHOWN_WEIGHT, SMALL_WEIGHT, cell_labels, cell_weights, decision_weights
from train_tiny.codes import DECODED_SIDE, Codes, clustered, named_loss, reconstruction_loss
from train_tiny.data import MAIN_SIZE, Samples, glyph_rows, halved, sample, small_pictures
from train_tiny.painter import Editor, Painter, by_cell, noise_levels
from train_tiny.painter_blocks import glyph_bias, glyph_states, strings_apart
from train_tiny.vocabulary import merges_of, processor_of, train_merges
from train_tiny.world.draw import draw
from train_tiny.world.scene import Background, Scene, Sign, Thing, sample_scene
from train_tiny.world.table import COLOUR_INDEX, Table
from train_tiny.world.vocabulary import LETTERS, SIGN_PLACES
from train_tiny.writer import (
    HOLDING_WEIGHT,
    LENGTH_STEP,
    ONE_IN,
    Group,
    Reviser,
    Writer,
    by_length,
    decoded,
    measured_by,
    predicted,
    prompt_ids,
    sequences,
)


@pytest.fixture(scope="module")
def transformer() -> Any:
    torch.manual_seed(0)
    model = models.build_transformer()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.requires_grad_(False)


@pytest.mark.parametrize("size", [(256, 256), (160, 224)])
def test_images_are_halved_as_by_the_image_processor(size: tuple[int, int]) -> None:
    pictures = draw(sample(4, seed=5).scenes, *size)
    wanted = F.interpolate(pictures.float(), scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 255).round()
    off = (halved(pictures).float() - wanted).abs()
    assert off.max() <= 1  # where a value lies between two
    assert off.mean() < 1e-3


def reference_velocity(model: Any, latents: Tensor, glyphs: Tensor, prior: Tensor, time: Tensor, caches: Any) -> Tensor:
    size = torch.tensor([[side * 8.0 for side in latents.shape[2:]]])
    kept = torch.zeros_like(prior, dtype=torch.bool)
    found: Tensor = model(
        latents, glyphs, prior, kept, time, size, torch.zeros(1, 2), kv_caches=caches, return_dict=False
    )[0]
    return found


def test_a_batch_of_edits_equals_the_transformers_forward(transformer: Any) -> None:
    count, height, width = 2, 16, 24
    latents, sources = torch.randn(2, count, 16, height, width)
    glyphs = torch.randn(count, 3, models.CONFIG.glyph_d_model)
    codes = torch.randint(models.CONFIG.codebook, (count, height // 4, width // 4))
    prior = codes.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1)
    times, rotary = torch.tensor([30.0, 700.0]), transformer.rope(latents)
    _, source = models.velocity(transformer, sources, None, codes, None, torch.zeros(count), rotary)
    batched, _ = models.velocity(transformer, latents, glyphs, codes, None, times, rotary, source)
    for row in range(count):
        one = slice(row, row + 1)
        caches = GlmImageKVCache(models.CONFIG.dit_layers)
        caches.set_mode("write")
        reference_velocity(transformer, sources[one], glyphs[one, :0], prior[one], torch.zeros(1), caches)
        caches.set_mode("read")
        alone = reference_velocity(transformer, latents[one], glyphs[one], prior[one], times[one], caches)
        assert torch.allclose(batched[one], alone, atol=1e-4)


def test_a_batch_of_strings_equals_the_glyph_encoders_forward() -> None:
    torch.manual_seed(2)
    encoder = models.build_glyph_encoder().requires_grad_(False)
    ids = torch.randint(3, 259, (3, 9))
    lengths = (2, 1, 6)
    own = torch.cat([encoder(string).last_hidden_state for string in ids.split(lengths, dim=1)], dim=1)
    assert torch.allclose(glyph_states(encoder, ids, glyph_bias(encoder, strings_apart(lengths))), own, atol=1e-5)
    assert own.std() > 0.1


def test_a_batch_equals_the_vision_towers_forward() -> None:
    torch.manual_seed(1)
    model = models.build_ar().model.requires_grad_(False)
    pictures = torch.randint(256, (2, 3, 48, 80), dtype=torch.uint8)
    mean, std = torch.tensor([models.IMAGE["image_mean"], models.IMAGE["image_std"]]).view(2, 1, 3, 1, 1)
    patches = ((pictures / 255 - mean) / std).unflatten(3, (5, 16)).unflatten(2, (3, 16))
    flat = patches.permute(0, 2, 4, 1, 3, 5).reshape(30, -1)
    own = model.visual(flat, grid_thw=torch.tensor([[1, 3, 5]] * 2)).last_hidden_state.view(2, 15, -1)
    features = models.tower_features(model.visual, pictures)
    assert torch.allclose(features, own, atol=1e-4)
    codes, _ = models.quantize(model.vqmodel, own)
    laid_out = own.unflatten(1, (3, 5)).permute(0, 3, 1, 2).contiguous()
    assert torch.equal(codes.flatten(), model.vqmodel.encode(laid_out).image_tokens)


@pytest.mark.parametrize("edit", [False, True])
def test_the_writers_sequences_equal_those_of_the_engine(edit: bool) -> None:
    lengths, longest, groups = [29, 32, 27], 36, []
    targets = [Grid(2, 3), Grid(2, 3), Grid(5, 4)]
    sources = {target: [PlacedGrid(1, target)] if edit else [] for target in targets}
    grids = {target: geometry.output_grids(target, image_to_image=edit) for target in targets}
    prompts, written = torch.randint(1000, 2000, (3, longest)), torch.randint(1000, 2000, (3, 321))
    for rows in ([0, 1], [2]):
        target = targets[rows[0]]
        tokens = sum(grid.tokens for grid in grids[target]) + 1
        laid_out = sequences(
            prompts[rows],
            torch.tensor(lengths)[rows],
            written[rows, :tokens],
            torch.from_numpy(geometry.prompt_positions(longest + 1, sources[target])),
            F.pad(torch.from_numpy(geometry.decode_positions(grids[target], 0)), (0, 1)),
        )
        ones = torch.ones(len(rows), tokens)
        groups.append(Group(*laid_out, torch.tensor(lengths)[rows], written[rows, :tokens], ones, ones == 1))
    found = {int(row[2]): row for group in by_length(groups) for row in zip(*group, strict=True)}
    assert len(found) == 3
    for row, (length, target) in enumerate(zip(lengths, targets, strict=True)):
        ids, positions, _, own, weights, large = found[length]
        tokens = int(weights.sum())
        assert tokens == sum(grid.tokens for grid in grids[target]) + 1
        end = length + tokens - 1
        assert ids[:end].tolist() == [*prompts[row, :length].tolist(), *written[row, : tokens - 1].tolist()]
        assert own[:tokens].tolist() == written[row, :tokens].tolist()
        assert torch.equal(large, weights == 1)
        prompt = geometry.prompt_positions(length, sources[target])
        decoded = geometry.decode_positions(grids[target], int(prompt[:, -1].max()) + 1)
        assert positions[:, :end].tolist() == np.concatenate([prompt, decoded], axis=1).tolist()


def test_a_batch_of_sequences_equals_the_decoders_forward() -> None:
    torch.manual_seed(4)
    decoder = models.build_ar().model.language_model.requires_grad_(False)
    ids, positions = torch.randint(models.CONFIG.codebook, (2, 21)), torch.randint(9, (3, 2, 21))
    own = decoder(ids, position_ids=positions, use_cache=False).last_hidden_state
    assert torch.allclose(decoded(decoder, ids, positions), own, atol=1e-5)
    assert own.std() > 0.1


@pytest.mark.parametrize("edits", [False, True])
def test_edits_of_a_scene_are_all_for_training_or_all_for_evaluation(edits: bool) -> None:
    samples = sample(900, 1, edits=edits)
    chosen = measured_by(samples)
    parts = [samples.rows(np.flatnonzero(some)) for some in (~chosen, chosen)]
    tables = (part.sources if edits else part.scenes for part in parts)
    trained, kept = ([str(row) for row in zip(*(column.tolist() for column in table), strict=True)] for table in tables)
    assert len(trained) + len(kept) == samples.scenes.length
    assert sorted(parts[0].prompts + parts[1].prompts) == sorted(samples.prompts)
    assert len(kept) == pytest.approx(samples.scenes.length / ONE_IN, rel=0.5)
    assert not set(kept) & set(trained)
    assert (len(set(kept)) < len(kept)) == edits


@pytest.mark.parametrize("edits", [False, True])
def test_prompts_have_the_ids_that_the_engine_gives_them(edits: bool, run_so_far: Path) -> None:
    samples, target = sample(40, 2, edits=edits), Grid(8, 8)
    processor = processor_of(run_so_far)
    ids, lengths = prompt_ids(processor, samples.prompts, target, [target] if edits else [])
    one = PromptTokenizer(processor)
    for row, length, prompt in zip(ids, lengths, samples.prompts, strict=True):
        own = (
            one.image_to_image(prompt, target, [target])[0]
            if edits
            else one.text_to_image(prompt, target, geometry.preview_grid(target))
        )
        assert row[:length].tolist() == own
        assert not row[length:].any()


def same(one: Table | None, other: Table | None) -> bool:
    assert one is not None
    assert other is not None
    return all(np.array_equal(*columns) for columns in zip(one, other, strict=True))


def test_samples_are_the_same_by_however_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train_tiny.data.CHUNK", 20)
    found = []
    for processes in (1, 3):
        monkeypatch.setattr("os.cpu_count", lambda count=processes: count)
        found.append(sample(50, 3, edits=True))
    one, other = found
    assert one.prompts == other.prompts
    assert same(one.scenes, other.scenes)
    assert same(one.sources, other.sources)


def test_parts_of_samples_make_the_whole() -> None:
    whole = sample(50, 3, edits=True)
    again = Samples.joined([whole.rows(slice(30)), whole.rows(np.arange(30, 50))])
    assert again.prompts == whole.prompts
    assert same(again.scenes, whole.scenes)
    assert same(again.sources, whole.sources)


def test_codes_that_are_alike_start_alike(run_so_far: Path) -> None:
    tokens = models.Tokens(run_so_far)
    rows = nn.Parameter(torch.randn(models.CONFIG.codebook + 7, 96))
    before = rows.detach().clone()
    tokens.spread_to(rows[: models.CONFIG.codebook])
    assert torch.equal(rows[models.CONFIG.codebook :], before[models.CONFIG.codebook :])
    codebook = nn.functional.normalize(tokens.quantizer.quantize.embedding.weight, dim=-1)
    own = nn.functional.normalize(rows[: models.CONFIG.codebook], dim=-1)
    assert torch.allclose(own @ own[:50].T, codebook @ codebook[:50].T, atol=1e-5)
    assert float(rows[0].detach().norm()) == pytest.approx(before.norm(dim=-1).mean().item(), rel=0.05)


def test_reconstruction_errors_are_weighted_by_cell() -> None:
    ring, star = Thing("ring", "blue", "large"), Thing("star", "red", "small")
    labels = cell_labels(Table.of([Scene((star, ring), "inside")]), Size(256, 256))
    weights = cell_weights(labels).view(8, 8)
    for cell in ((0, 0), (4, 4)):
        errors = torch.zeros(1, 3, 8 * DECODED_SIDE, 8 * DECODED_SIDE)
        errors[0, :, cell[0] * DECODED_SIDE : (cell[0] + 1) * DECODED_SIDE, cell[1] * DECODED_SIDE :][
            ..., :DECODED_SIDE
        ] = 2.0
        assert reconstruction_loss(errors, labels) == pytest.approx(
            5.0 * float(weights[cell] / weights.float().sum()), rel=1e-3
        )
    assert weights[4, 4] == HELD_WEIGHT


@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_noise_levels_are_the_schedules(tokens: int) -> None:
    steps = schedule(configs.scheduler_config(), 20, tokens, torch.device("cpu"))
    levels = noise_levels((steps.timesteps + 1) / 1000, tokens)
    assert torch.allclose(levels, steps.sigmas[:-1], atol=1e-6)


@pytest.mark.parametrize("prompt", ["no quotes", "'CAT'", "'CAT' into “DOG”", "写着「猫」"])
def test_glyph_rows_are_the_prompts(prompt: str) -> None:
    assert [list(row) for row in glyph_rows(prompt)] == prompts.glyph_token_ids(
        prompts.quoted_strings(prompt), ByT5Tokenizer()
    )


def test_cells_are_labelled_by_their_contents() -> None:
    scene = Scene((Thing("star", "red", "large"),), sign=Sign("HI"))
    labels = cell_labels(Table.of([scene]), Size(256, 256))
    shapes, letters = labels.shape.view(8, 8), labels.letter.view(8, 8)
    assert shapes[3, 4] == 4  # the star's middle, above the sign
    assert not shapes[0].any()
    assert not shapes[7].any()
    assert letters[6].unique().tolist() == [0, 8, 9]  # nothing, H, I
    assert not letters[:5].any()


@pytest.mark.parametrize(("size", "cell"), [((256, 256), 32), ((512, 288), 32), ((256, 256), 16), ((176, 352), 16)])
def test_cells_labelled_with_a_letter_are_where_it_is_rendered(size: tuple[int, int], cell: int) -> None:
    blank = Scene((), background=Background("plain", ("light pink",)))
    scenes = [replace(blank, sign=Sign("WORD", place)) for place in SIGN_PLACES]
    labels = cell_labels(Table.of(scenes), Size(*size), cell).letter.unflatten(1, (size[0] // cell, size[1] // cell))
    empty = draw([blank], *size)
    for picture, letters in zip(draw(scenes, *size), labels, strict=True):
        written = (picture != empty[0]).any(0).float()
        share = nn.functional.avg_pool2d(written[None], cell)[0]
        assert share[letters > 0].min() > 0
        assert (letters > 0)[share > 0.9].all()
        assert [LETTERS[letter - 1] for letter in letters.amax(0).unique_consecutive().tolist() if letter] == [*"WORD"]


def test_labels_of_a_half_size_image_with_half_size_cells_are_the_same() -> None:
    scenes = [scene for scene in map(sample_scene, map(Random, range(40))) if scene.sign is None]
    half, whole = (cell_labels(Table.of(scenes), Size(16 * cell, 12 * cell), cell) for cell in (16, 32))
    assert half.shape.any()
    assert all(torch.allclose(one.float(), other.float()) for one, other in zip(half, whole, strict=True))


def test_cells_of_an_object_inside_another_are_labelled() -> None:
    ring, star = Thing("ring", "blue", "large"), Thing("star", "red", "small")
    inside, apart = Scene((star, ring), "inside"), Scene((replace(star, x=0.2), replace(ring, x=0.7)), "left of")
    labels = cell_labels(Table.of([inside, apart]), Size(256, 256))
    assert labels.held[0].any()
    assert torch.equal(labels.held[0] == 1, labels.colour[0] == 1 + COLOUR_INDEX["red"])
    assert (labels.colour[1] == 1 + COLOUR_INDEX["red"]).any()
    assert not labels.held[1].any()


def test_of_an_edit_the_cells_where_things_begin_count_more() -> None:
    circle, square = Thing("circle", "red", "large", x=0.25, y=0.5), Thing("square", "blue", "small", x=0.75, y=0.5)
    scenes = [Scene((circle, square), "left of"), Scene((replace(circle, x=0.5),))]
    both, one = decision_weights(Table.of(scenes), Size(256, 256)).view(2, 8, 8)
    assert one.amax(dim=1).tolist() == [1, 1, 8, 4, 1, 1, 1, 1]
    assert both[:, :4].amax(dim=1).tolist() == one.amax(dim=1).tolist()
    assert both[3, 4:].max() == 8, "the small one begins a row further down"
    assert one[2].tolist() == [1, 1, 8, 8, 8, 8, 1, 1]


def test_the_painters_cells_are_weighted_by_their_contents() -> None:
    ring, star = Thing("ring", "blue", "large"), Thing("star", "red", "small")
    scenes = [Scene((star, ring), "inside"), Scene((), sign=Sign("HI")), Scene((star,))]
    labels = cell_labels(Table.of(scenes), Size(256, 384))
    weights = cell_weights(labels)
    assert weights.shape == (3, 96)
    assert torch.equal(weights[0] == HELD_WEIGHT, labels.held[0] == 1)
    assert torch.equal(weights[0] == SHOWN_WEIGHT, labels.colour[0] == 1 + COLOUR_INDEX["blue"])
    assert torch.equal(weights[1] == SHOWN_WEIGHT, labels.letter[1] > 0)
    assert torch.equal(weights[2] == SMALL_WEIGHT, labels.shape[2] > 0)
    assert [set(of_one.unique().tolist()) - {1.0} for of_one in weights] == [
        {SHOWN_WEIGHT, HELD_WEIGHT}, {SHOWN_WEIGHT}, {SMALL_WEIGHT},
    ]  # fmt: skip
    errors = torch.zeros(2, 16, 32, 48)
    errors[1, :, 4:8, 8:12] = 3.0
    assert torch.equal(by_cell(errors).view(2, 8, 12)[1, 1], torch.tensor([0, 0, 3.0] + [0] * 9))
    assert by_cell(errors).sum() == 3


def test_a_targets_weight_is_its_part_of_the_loss() -> None:
    logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    each = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 3)
    weights = torch.ones(2, 3)
    weights[0, 1] = 9.0
    loss, right = predicted(logits, targets, weights)
    assert torch.allclose(loss, (each.sum() + 8 * each[0, 1]) / 14)
    assert torch.equal(right, (logits.argmax(-1) == targets).float())


def test_a_cells_weight_is_its_part_of_the_loss() -> None:
    logits, label = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 12))
    each = nn.functional.cross_entropy(logits.flatten(2), label, reduction="none")
    weight = torch.ones(2, 12)
    assert torch.allclose(named_loss(logits, label, weight), each.mean())
    weight[0, 3] = 9.0
    assert torch.allclose(named_loss(logits, label, weight), (each.sum() + 8 * each[0, 3]) / 32)


def test_the_vaes_images_are_whole_crops_of_large_ones_and_four_small_ones() -> None:
    scenes = sample(48, 0).scenes
    pictures = sheets(scenes, torch.device("cpu"))
    assert pictures.shape == (24 + 8 + 8 + 2, 3, 256, 256)
    assert torch.equal(pictures[:24], draw(scenes.rows(slice(24)), 256, 256))
    double = draw(scenes.rows(slice(24, 32)), 512, 512)
    assert torch.equal(pictures[24:26], double[::4, :, :256, :256])
    assert torch.equal(pictures[30:32], double[3::4, :, 256:, 256:])
    small = draw(scenes.rows(slice(40, 48)), 128, 128)
    assert torch.equal(pictures[41, :, 128:, :128], small[6])


def test_codes_start_where_features_are() -> None:
    torch.manual_seed(0)
    places = nn.functional.normalize(torch.randn(5, 16), dim=-1)
    vectors = nn.functional.normalize(places.repeat(200, 1) + 0.02 * torch.randn(1000, 16), dim=-1)
    centres = clustered(vectors, 40)
    assert torch.allclose(centres.norm(dim=-1), torch.ones(40))
    assert (centres @ places.T).amax(0).min() > 0.99
    assert (centres @ places.T).amax(1).min() > 0.98


def test_quoted_words_are_not_merged() -> None:
    merges = train_merges(["a red ring says 'BANANA'", "one red ring with 'BANANA'"] * 30)
    assert ("r", "e") in merges or ("e", "d") in merges
    assert not any(set("BAN") & set(left + right) for left, right in merges)


@pytest.fixture(scope="module")
def initial_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first two stages are done, with initial weights, and with the merges of a few texts."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(6)
    ar = models.build_ar().model
    parts = {"vae": {"vae": models.build_vae()}, "vision": {"tower": ar.visual, "quantizer": ar.vqmodel}}
    latents = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    for name, modules in parts.items():
        weights = nn.ModuleDict(modules).state_dict()
        loop.save(folder / f"{name}.pt", {"weights": weights, "done": True, "results": latents})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train_tiny.vocabulary.TEXTS", 600)
        merges_of(folder)
    return folder


@pytest.fixture
def run_so_far(initial_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to which a test adds stages."""
    return Path(shutil.copytree(initial_run, tmp_path / "run", copy_function=os.link))


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for sizes in ("codes.SPREAD_SIZES", "painter.SPREAD_SIZES", "writer.OTHER_SIZES"):
        monkeypatch.setattr(f"train_tiny.{sizes}", (Size(128, 128),))


@pytest.fixture(scope="module")
def pictures() -> Samples:
    return sample(60, 0)


@pytest.fixture(scope="module")
def edits() -> Samples:
    return sample(60, 0, edits=True)


@pytest.fixture(scope="module")
def writer(initial_run: Path, pictures: Samples) -> Writer:
    """A writer of pictures before its first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train_tiny.writer.OTHER_SIZES", (Size(128, 128),))
        return Writer([pictures], initial_run, torch.device("cpu"), 2, 0)


@pytest.mark.usefixtures("few_sizes")
def test_the_editor_starts_from_the_painters_weights_with_edits_and_other_sizes(
    run_so_far: Path,
) -> None:
    device = torch.device("cpu")
    with pytest.raises(SystemExit, match="the stage painter is not done"):
        Editor([], run_so_far, device, 2, 0)
    painter = Painter([sample(6, 0)], run_so_far, device, 2, 0)
    codebook = models.Tokens(run_so_far).quantizer.quantize.embedding.weight
    assert torch.allclose(
        likeness(painter.module["transformer"].prior_token_embedding.weight), likeness(codebook), atol=1e-5
    )
    loop.Training(painter, run_so_far / "painter.pt").finish(1.0)
    editor = Editor([sample(12, 1), sample(8, 1, edits=True)], run_so_far, device, 2, 0)
    learned = painter.module.state_dict()
    assert all(torch.equal(value, learned[name]) for name, value in editor.module.state_dict().items())
    assert {group.size for group in painter._groups} == {MAIN_SIZE}
    assert {group.size for group in editor._groups} == {MAIN_SIZE, Size(128, 128)}
    for stage, kinds in ((painter, {False}), (editor, {False, True})):
        assert {group.source is not None for group in stage._groups} == kinds
        for index, group in enumerate(stage._groups):
            losses = stage.losses((index, False))
            assert losses["loss"].isfinite()
            assert losses["edit_steps"] == (group.source is not None)


def likeness(rows: Tensor) -> Tensor:
    directions = nn.functional.normalize(rows.detach()[:40].float(), dim=-1)
    return directions @ directions.T


@pytest.mark.usefixtures("few_sizes")
def test_the_reviser_starts_from_the_writers_weights_with_edits_and_other_sizes(
    run_so_far: Path, writer: Writer, pictures: Samples, edits: Samples
) -> None:
    device = torch.device("cpu")
    with pytest.raises(SystemExit, match="the stage writer is not done"):
        Reviser([], run_so_far, device, 2, 0)
    loop.Training(writer, run_so_far / "writer.pt").finish(1.0)
    reviser = Reviser([pictures, edits], run_so_far, device, 2, 0)
    learned = writer.module.state_dict()
    assert all(torch.equal(value, learned[name]) for name, value in reviser.module.state_dict().items())
    # Codes of both grids, and how many of them are the large one's: of pictures and of edits.
    sizes = [{256 + 16: 16, 256 + 64: 64}, {16: 16, 64: 64}]
    for stage, those in ((writer, sizes[0]), (reviser, sizes[0] | sizes[1])):
        counts = [(group, (group.weights > 0).sum(1)) for group in stage._groups]
        assert {int(count) - 1 for _, own in counts for count in own} == set(those)
        for group, own in counts:
            assert group.ids.shape[1] % LENGTH_STEP == 0
            assert (group.lengths + own <= group.ids.shape[1]).all()
            for large, count in zip(group.large, own.tolist(), strict=True):
                assert large.nonzero().flatten().tolist() == list(range(count - 1 - those[count - 1], count - 1))
    for index in range(len(reviser._groups)):
        assert reviser.losses(index)["loss"].isfinite()


def test_images_of_an_object_inside_another_weigh_more(writer: Writer, pictures: Samples) -> None:
    weights = torch.cat([group.weights.amax(1) for group in (*writer._groups, *writer._kept)])
    assert 0 < (weights == HOLDING_WEIGHT).sum() == pictures.scenes.inside.sum() < 60
    assert all(
        ((group.weights == 0) | (group.weights == group.weights.amax(1)[:, None])).all() for group in writer._groups
    )


def by_prompt(groups: list[Group], prompts: list[str], tokenizer: Any) -> dict[str, list[Tensor]]:
    """The sequences of each prompt, its words as they are decoded."""
    found: dict[str, list[Tensor]] = {}
    for group in groups:
        for row in zip(*group, strict=True):
            text = tokenizer.decode(row[0][: row[2]])
            found[max((prompt for prompt in prompts if prompt in text), key=len)] = list(row)
    return found


@pytest.mark.usefixtures("few_sizes")
def test_evaluation_samples_are_not_trained_on_and_sources_are_weighted(run_so_far: Path) -> None:
    samples = sample(120, 0, edits=True)
    writer = Writer([samples], run_so_far, torch.device("cpu"), 2, 0)
    kept, tokenizer = measured_by(samples), writer._processor.tokenizer
    for groups, chosen in ((writer._groups, ~kept), (writer._kept, kept)):
        rows = np.flatnonzero(chosen)
        found = by_prompt(groups, samples.prompts, tokenizer)
        assert set(found) == {samples.prompts[row] for row in rows}
        assert sum(len(group.lengths) for group in groups) == len(rows)
    rows = np.flatnonzero(~kept)[:40]  # of the half that is of the main size
    chosen = [row for row in rows.tolist() if samples.prompts.count(samples.prompts[row]) == 1]
    before, after = (decision_weights(of.rows(np.array(chosen)), MAIN_SIZE) for of in (samples.sources, samples.scenes))
    assert not torch.equal(before, after)
    inside = samples.scenes.inside[chosen]
    assert set(inside.tolist()) == {False, True}
    found = by_prompt(writer._groups, samples.prompts, tokenizer)
    for row, decisive, holding in zip(chosen, before, inside.tolist(), strict=True):
        *_, weights, _ = found[samples.prompts[row]]
        assert torch.equal(weights[:64].float(), decisive * (HOLDING_WEIGHT if holding else 1.0))
    ids, *_ = found[samples.prompts[chosen[0]]]
    source = samples.sources.rows(slice(chosen[0], chosen[0] + 1))
    small = next(iter(small_pictures(source, Grid(8, 8), torch.device("cpu"), preview=False)))
    assert torch.equal(ids[1:65], models.Tokens(run_so_far).encode(small)[0].int())


@pytest.mark.usefixtures("few_sizes")
def test_the_loss_of_a_batch_equals_that_of_its_sequences(run_so_far: Path, edits: Samples) -> None:
    writer = Writer([edits], run_so_far, torch.device("cpu"), 2, 0)
    group = max(writer._groups, key=lambda group: int((group.weights == 0).sum()) * len(set(group.lengths.tolist())))
    assert len(set(group.lengths.tolist())) > 1
    logits = [own_logits(writer, *row) for row in zip(group.ids, group.positions, group.lengths, strict=True)]
    for row, own in enumerate(logits):  # some of what is likeliest is right
        group.targets[row, : len(own) : 2] = own.argmax(-1)[: group.targets.shape[1] : 2]
    losses, hits = torch.zeros(group.targets.shape), torch.zeros(group.targets.shape)
    for row, own in enumerate(logits):
        count = int((group.weights[row] > 0).sum())
        targets = group.targets[row, :count].long()
        losses[row, :count] = F.cross_entropy(own[:count], targets, reduction="none")
        hits[row, :count] = (own[:count].argmax(-1) == targets).float()
    with torch.no_grad():
        found = writer.loss_of(group)
    assert torch.allclose(found["loss"], (losses * group.weights).sum() / group.weights.sum(), rtol=1e-4)
    assert 0.3 < float(found["large_grid_right"]) < 1
    assert torch.allclose(found["large_grid_right"], hits[group.large].mean())


@torch.no_grad()
def own_logits(writer: Writer, ids: Tensor, positions: Tensor, length: Tensor) -> Tensor:
    """What the modules themselves say of the codes after a prompt, one sequence alone: [tokens, codes]."""
    decoder, head = writer.module["decoder"], writer.module["head"]
    alone = decoder(ids[None].long(), position_ids=positions[:, None].long(), use_cache=False).last_hidden_state
    logits: Tensor = head(alone)[0, int(length) - 1 :]
    return logits


def test_the_writer_begins_with_codes_that_are_alike(run_so_far: Path, writer: Writer) -> None:
    codebook = likeness(models.Tokens(run_so_far).quantizer.quantize.embedding.weight)
    decoder = writer.module["decoder"]
    for rows in (decoder.embed_tokens.weight, writer.module["head"].weight):
        assert torch.allclose(likeness(rows), codebook, atol=1e-5)
    by_muon = loop.Training(writer, run_so_far / "writer.pt").optimizers[1].param_groups
    taken = {id(matrix) for group in by_muon for matrix in group["params"]}
    assert taken == {id(m.weight) for m in decoder.layers.modules() if isinstance(m, nn.Linear)}


@pytest.mark.usefixtures("few_sizes")
def test_every_second_image_of_the_codes_is_a_preview(run_so_far: Path) -> None:
    samples = sample(24, 0)
    codes = Codes([samples], torch.device("cpu"), 4, 0)
    assert [pictures.shape[2:] for pictures in codes._pictures] == [(128, 128), (256, 256), (64, 64), (256, 256)]
    main = samples.rows(slice(8)).scenes
    assert torch.equal(codes._pictures[0][1], halved(draw(main.rows(slice(2, 3)), 256, 256))[0])
    assert torch.equal(codes._pictures[1][0], draw(main.rows(slice(1, 2)), 256, 256)[0])
    for preview in (False, True):
        labels = cell_labels(main.rows(slice(preview, None, 2)), MAIN_SIZE, 16 if preview else 32)
        assert all(map(torch.equal, codes._labels[preview], labels))
    assert all(codes.losses(group)["loss"].isfinite() for group in range(4))
