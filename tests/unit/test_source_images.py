"""Source images: every file format becomes the same upright RGB image, of one grid for both stages."""

from __future__ import annotations

import base64
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import GlmImageImageProcessorPil, GlmImageProcessor
from transformers.models.glm_image.image_processing_pil_glm_image import smart_resize

from glm_image.ar.vision import patches_of
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.errors import CheckpointError, InvalidInputError
from glm_image.request import geometry, images, source_images
from glm_image.request.declaration import read, write
from glm_image.request.geometry import Grid, PlacedGrid, Size, SourceRule
from glm_image.request.limits import LIMIT_PREFIX, Limits
from glm_image.request.parameters import GenerationParameters, Sampling
from glm_image.request.prompts import PromptTokenizer
from helpers import MakeCheckpoint
from pictures import encoded, picture

RULE = SourceRule()
LIMITS = Limits()
DEFAULTS = Sampling(0.9, 0.75, 256)
SIDES = st.integers(16, 6000)


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@given(SIDES, SIDES, st.sampled_from([(512, 2048), (64, 2048), (256, 1024), (512, 4096)]))
def test_source_grid_matches_the_reference_processor(height: int, width: int, edges: tuple[int, int]) -> None:
    rule = RULE._replace(shortest_edge=edges[0], longest_edge=edges[1])
    if max(height, width) > 4 * min(height, width):
        with pytest.raises(ValueError, match="aspect"):
            smart_resize(height, width)
        with pytest.raises(InvalidInputError, match=f"^image is {width} x {height} pixels; allowed: the longer side"):
            geometry.source_grid(Size(height, width), rule)
        return
    theirs = smart_resize(height, width, 16, edges[0] ** 2, edges[1] ** 2)
    assert geometry.source_grid(Size(height, width), rule) == (theirs[0] // 16, theirs[1] // 16)


@pytest.mark.parametrize(
    ("original", "grid"),
    [
        (Size(1024, 1024), Grid(32, 32)),
        (Size(512, 512), Grid(16, 16)),
        (Size(1080, 1920), Grid(34, 60)),
        (Size(3000, 4000), Grid(48, 64)),
        (Size(10, 10), Grid(16, 16)),
        (Size(1, 1), Grid(16, 16)),
        (Size(1, 3), Grid(16, 48)),
        (Size(7, 15), Grid(16, 34)),
        (Size(2048, 512), Grid(64, 16)),
    ],
)
def test_source_grids(original: Size, grid: Grid) -> None:
    assert geometry.source_grid(original, RULE) == grid


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5)), max_size=4), st.integers(1, 20))
def test_prompt_positions(parts: list[tuple[int, int, int]], tail: int) -> None:
    """Each image takes as many positions as its longer side; text goes on after it."""
    placed, expected, length, position = [], [], 0, 0
    for height, width, text in parts:
        expected += [(position + index,) * 3 for index in range(text)]
        length, position = length + text, position + text
        placed.append(PlacedGrid(length, Grid(height, width)))
        expected += [(position, position + y, position + x) for y in range(height) for x in range(width)]
        length, position = length + height * width, position + max(height, width)
    expected += [(position + index,) * 3 for index in range(tail)]
    assert geometry.prompt_positions(length + tail, placed).T.tolist() == [list(one) for one in expected]
    if not parts:
        assert np.array_equal(geometry.prompt_positions(tail), geometry.text_positions(tail))


RGB = picture(40, 30, seed=3)


def sixteen_bit(levels: np.ndarray, colour: int) -> bytes:
    """A PNG of 16 bits a channel, as Pillow cannot write it; colour 0 = grey, 2 = RGB, 4 = grey and alpha, 6 = RGBA."""
    height, width = levels.shape[:2]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def over_white(rgba: Image.Image) -> np.ndarray:
    alpha = np.asarray(rgba)[..., 3:].astype(float) / 255
    return np.asarray(rgba)[..., :3] * alpha + 255 * (1 - alpha)


def with_alpha() -> Image.Image:
    rgba = RGB.convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(RGB.size))
    return rgba


def palette_with_a_transparent_colour() -> tuple[bytes, np.ndarray]:
    flat = RGB.quantize(8)
    expected = np.asarray(flat.convert("RGB")).copy()
    expected[np.asarray(flat) == 3] = 255
    return encoded(flat, transparency=3), expected


def sequence(first: Image.Image, file_format: str, **options: Any) -> bytes:
    return encoded(
        first, file_format, save_all=True, append_images=[first.transpose(Image.Transpose.ROTATE_180)] * 2, **options
    )


GREY = np.asarray(RGB.convert("L"))
DEEP = GREY.astype(np.uint16) * 256 + 200
DEEP_RGB = np.asarray(RGB).astype(np.uint16) * 256 + 77
KINDS: dict[str, tuple[bytes, np.ndarray, float]] = {
    "RGB PNG": (encoded(RGB), np.asarray(RGB), 0),
    "RGB JPEG": (encoded(RGB, "jpeg", quality=100, subsampling=0), np.asarray(RGB), 12),
    "progressive JPEG": (encoded(RGB, "jpeg", quality=100, subsampling=0, progressive=True), np.asarray(RGB), 12),
    "RGB WebP": (encoded(RGB, "webp", lossless=True), np.asarray(RGB), 0),
    "RGBA PNG": (encoded(with_alpha()), over_white(with_alpha()), 1),
    "RGBA WebP": (encoded(with_alpha(), "webp", lossless=True, exact=True), over_white(with_alpha()), 1),
    "grey PNG": (encoded(RGB.convert("L")), np.stack([GREY] * 3, -1), 0),
    "grey JPEG": (encoded(RGB.convert("L"), "jpeg", quality=100), np.stack([GREY] * 3, -1), 4),
    "grey and alpha": (encoded(with_alpha().convert("LA")), over_white(with_alpha().convert("LA").convert("RGBA")), 1),
    "palette": (encoded(RGB.quantize(16)), np.asarray(RGB.quantize(16).convert("RGB")), 0),
    "palette with a transparent colour": (*palette_with_a_transparent_colour(), 0),
    "black and white": (encoded(RGB.convert("1")), np.asarray(RGB.convert("1").convert("RGB")), 0),
    "16-bit grey": (sixteen_bit(DEEP, 0), np.stack([GREY] * 3, -1), 0),
    "16-bit RGB": (sixteen_bit(DEEP_RGB, 2), np.asarray(RGB), 0),
    "16-bit grey and alpha": (
        sixteen_bit(np.stack([DEEP, np.full_like(DEEP, 65535)], -1), 4),
        np.stack([GREY] * 3, -1),
        0,
    ),
    "16-bit RGBA": (
        sixteen_bit(np.concatenate([DEEP_RGB, np.zeros_like(DEEP)[..., None]], -1), 6),
        np.full((30, 40, 3), 255),
        0,
    ),
    "CMYK JPEG": (encoded(RGB.convert("CMYK"), "jpeg", quality=100, subsampling=0), np.asarray(RGB), 12),
    "animated WebP": (sequence(RGB, "webp", lossless=True), np.asarray(RGB), 0),
    "animated PNG": (sequence(RGB, "png"), np.asarray(RGB), 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_format_is_decoded_to_rgb(kind: str) -> None:
    file, expected, worst = KINDS[kind]
    for data in (file, base64.b64encode(file), b"data:image/whatever;base64," + base64.b64encode(file)):
        decoded = images.decode_source(data)
        assert (decoded.mode, decoded.size) == ("RGB", RGB.size)
        assert np.abs(pixels_of(decoded).astype(float) - expected).max() <= worst


def test_base64_with_line_breaks_is_decoded() -> None:
    assert np.array_equal(images.decode_source(base64.encodebytes(encoded(RGB))), np.asarray(RGB))


STORED = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_upright(orientation: int, file_format: str) -> None:
    turn = STORED[orientation]
    stored = RGB if turn is None else RGB.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpeg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(file_format, {})
    decoded = images.decode_source(encoded(stored, file_format, exif=exif, **options))
    assert decoded.size == RGB.size
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(RGB)).max() <= (12 if file_format == "jpeg" else 0)


def test_transparency_is_kept_when_an_image_is_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    flat = RGB.quantize(8)
    decoded = images.decode_source(encoded(flat, transparency=3, exif=exif))
    expected = np.asarray(flat.convert("RGB")).copy()
    expected[np.asarray(flat) == 3] = 255
    assert np.array_equal(decoded, expected[::-1, ::-1])


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_image_with_broken_exif_is_decoded(exif: bytes) -> None:
    assert images.decode_source(encoded(RGB, "jpeg", exif=exif)).size == RGB.size


@given(st.binary(max_size=60), st.sampled_from(["png", "jpeg", "webp"]), st.data())
def test_damaged_files_are_refused_or_decoded(noise: bytes, file_format: str, data: st.DataObject) -> None:
    file = bytearray(encoded(RGB, file_format))
    place = data.draw(st.integers(0, len(file) - 1))
    file[place : place + len(noise)] = noise
    try:
        decoded = images.decode_source(bytes(file), "image 2 of 3")
    except InvalidInputError as error:
        refusal = str(error)
    else:
        assert decoded.mode == "RGB"
        return
    assert refusal.startswith("image 2 of 3 is ")
    assert "allowed" in refusal
    assert refusal.isprintable()


def test_size_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    file = encoded(RGB)

    def load(_: Image.Image) -> None:
        raise AssertionError("its pixels were decoded")

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(
        InvalidInputError, match=r"^image is a PNG file of 40 x 30 pixels; allowed: at most 1199 pixels$"
    ):
        images.decode_source(file, limits=Limits(source_decoded_pixels=1199))
    with pytest.raises(InvalidInputError, match="longer side at most 4 times"):
        images.decode_source(encoded_without_load(161, 40))


def encoded_without_load(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def test_both_stages_scale_a_source_to_the_same_grid() -> None:
    files = [encoded(picture(700, 530)), encoded(picture(520, 1300))]
    limits, grids = Limits(), (Grid(17, 22), Grid(41, 16))
    ar_sources = source_images.for_ar(files, limits, RULE)
    assert tuple(source.grid for source in ar_sources) == grids
    assert [source.pixels.shape for source in ar_sources] == [(16 * g.height, 16 * g.width, 3) for g in grids]
    ids = np.arange(sum(grid.tokens for grid in grids), dtype=np.int32)
    dit_sources = tuple(source_images.for_dit(files, ids, grids, limits, RULE))
    assert [source.pixels.shape for source in dit_sources] == [(32 * g.height, 32 * g.width, 3) for g in grids]
    assert np.array_equal(np.concatenate([source.token_ids for source in dit_sources]), ids)


def test_patches_match_the_reference_processor(checkpoint_folder: Path) -> None:
    image = picture(700, 530)
    processor = Checkpoint.open(checkpoint_folder).image_processor
    theirs = GlmImageImageProcessorPil.from_pretrained(checkpoint_folder / "processor")([image], return_tensors="np")
    ours = patches_of(processor, source_images.for_ar([encoded(image)], LIMITS, RULE))
    assert ours.dtype == np.float32
    assert np.array_equal(ours, theirs["pixel_values"])


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ([], r"^image is 0 files; allowed: 1 to 4 files$"),
        ([b""] * 5, r"^image is 5 files; allowed: 1 to 4 files$"),
        (
            [encoded(RGB), b""],
            r"^image 2 of 2 is empty; allowed: the bytes of a PNG, JPEG or WebP file, or their base64$",
        ),
        ([encoded(picture(1400, 1400))] * 3, r"^image is 3 files that make 5947392 pixels in all.* at most 4194304;"),
    ],
)
def test_invalid_source_images_are_refused(files: list[bytes], sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        GenerationParameters(prompt="x", images=tuple(files)).resolve(LIMITS, DEFAULTS)


def test_omitted_size_is_that_of_the_first_source() -> None:
    def size(**asked: int) -> Size:
        given = (encoded(picture(700, 530)), encoded(picture(512, 512)))
        return GenerationParameters(prompt="x", images=given, **asked).resolve(LIMITS, DEFAULTS).requested

    assert size() == (544, 704)
    assert size(height=100) == (100, 704)
    assert size(width=100) == (544, 100)
    small = Limits(max_side=600)
    with pytest.raises(InvalidInputError, match=r"^width is 704; allowed: 32 to 600$"):
        GenerationParameters(prompt="x", images=(encoded(picture(700, 530)),)).resolve(small, DEFAULTS)


@pytest.mark.parametrize("prefix", ["", "[gMASK]<sop><|user|>\n"])
def test_prompts_match_the_reference(make_checkpoint: MakeCheckpoint, prefix: str) -> None:
    folder = make_checkpoint(weights=False, chat_prefix=prefix, source_min_pixels=64 * 64)
    processor = GlmImageProcessor.from_pretrained(folder / "processor")
    given = [picture(96, 64), picture(64, 128)]
    content = [{"type": "image", "image": image} for image in given] + [{"type": "text", "text": "blue 'x'"}]
    theirs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]], tokenize=True, padding=False, target_h=96, target_w=64,
        return_dict=True, return_tensors="pt",
    )  # fmt: skip
    grids = [Grid(2, 3), Grid(4, 2)]
    ids, placed = PromptTokenizer(processor).image_to_image("blue 'x'", Grid(3, 2), grids)
    assert ids == theirs["input_ids"][0].tolist()
    assert [grid for _, grid in placed] == grids
    for start, grid in placed:
        assert set(ids[start : start + grid.tokens]) == {processor.image_token_id}
        assert ids[start - 1] == processor.tokenizer.bos_token_id
        assert ids[start + grid.tokens] == processor.tokenizer.eos_token_id


def test_text_that_spells_an_image_token_is_text(checkpoint_folder: Path) -> None:
    processor = GlmImageProcessor.from_pretrained(checkpoint_folder / "processor")
    ids, placed = PromptTokenizer(processor).image_to_image("a <|image|> b", Grid(1, 1), [Grid(1, 2)])
    assert ids.count(processor.image_token_id) == 2
    assert len(placed) == 1


@pytest.mark.parametrize("template", ["{{ '\ue0a5' }}", "<|image|><|image|><|image|>\ue0a5"])
def test_template_without_the_images_is_refused(checkpoint_folder: Path, template: str) -> None:
    processor = GlmImageProcessor.from_pretrained(checkpoint_folder / "processor")
    processor.chat_template = template
    with pytest.raises(CheckpointError, match="processor/chat_template: shows "):
        PromptTokenizer(processor).image_to_image("x", Grid(1, 1), [Grid(1, 2), Grid(1, 1)])


def test_checkpoint_of_another_patch_size_is_refused(tmp_path: Path, checkpoint_folder: Path) -> None:
    (tmp_path / "processor").mkdir()
    config = (checkpoint_folder / "processor" / "preprocessor_config.json").read_text()
    (tmp_path / "processor" / "preprocessor_config.json").write_text(
        config.replace('"patch_size": 16', '"patch_size": 14')
    )
    with pytest.raises(CheckpointError, match="patches of 14 pixels and sides of 512 to 2048; allowed: patches of 16"):
        _ = Checkpoint(tmp_path).source_rule
    with pytest.raises(CheckpointError, match="processor: cannot be used"):
        _ = Checkpoint(tmp_path / "none").source_rule


def test_limits_are_written_as_whole_numbers() -> None:
    written = write(Limits(), LIMIT_PREFIX)
    assert written["limit_source_bytes"] == "33554432"
    assert written["limit_max_source_pixels"] == "4194304"
    assert read(Limits, written, LIMIT_PREFIX) == Limits()


def test_paths_and_urls_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(RGB))
    for name in (str(path), path.as_uri()):
        with pytest.raises(InvalidInputError, match=r"^image is "):
            images.decode_source(name.encode())
