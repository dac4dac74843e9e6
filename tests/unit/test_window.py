from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_image.ar.commands import Admit
from glm_image.ar.config import NOISE_BLOCK
from glm_image.ar.first_guesses import first_guesses
from glm_image.ar.slot_sequence import SlotSequence
from glm_image.ar.speculation import MAX_WINDOW
from glm_image.ar.state import DecodeState
from glm_image.ar.window import Window, accept, window_rows
from glm_image.request.geometry import Grid, PlacedGrid
from glm_image.request.parameters import Sampling
from helpers import MakeCheckpoint, OpenExecutor

SLOTS, POSITIONS, PROMPT = 3, 80, 5
WRONG = 9999


def function(slot: int, tokens: tuple[int, ...]) -> int:
    """Stands for the decoder: the token after a prefix."""
    return hash((slot, tokens)) % 4


@pytest.fixture(scope="module")
def state_of(make_checkpoint: MakeCheckpoint) -> DecodeState:
    config = OpenExecutor(make_checkpoint(), slots=1).config
    return DecodeState.idle(config, SLOTS, POSITIONS, torch.device("cpu"), torch.float32)


def begin(state: DecodeState, window: Window, slot: int, total: int) -> None:
    state.output[slot] = WRONG
    state.output[slot, 0] = function(slot, ())
    state.set(slot, PROMPT, sampled=1, active=True)
    window.total[slot], window.known[slot] = total, 1
    window.guess_from[slot] = (torch.arange(POSITIONS) - 3).clamp(min=0)


def layout(window: Window, widths: list[int]) -> None:
    slots = [slot for slot, width in enumerate(widths) for _ in range(width)]
    offsets = [offset for width in widths for offset in range(width)]
    padding = len(window.slot) - len(slots)
    window.slot.copy_(torch.tensor(slots + [0] * padding))
    window.offset.copy_(torch.tensor(offsets + [POSITIONS] * padding))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_windows_accept_what_one_by_one_decoding_samples(state_of: DecodeState, data: st.DataObject) -> None:
    state, window = state_of, Window.idle(SLOTS, POSITIONS, 3 * MAX_WINDOW, torch.device("cpu"))
    totals = [data.draw(st.integers(0, POSITIONS - PROMPT - 1)) for _ in range(SLOTS)]
    for slot, total in enumerate(totals):
        begin(state, window, slot, total) if total else state.set(slot, 0, sampled=0, active=False)
    want = [list[int]() for _ in totals]
    for slot, total in enumerate(totals):
        for _ in range(total):
            want[slot].append(function(slot, tuple(want[slot])))
    for _ in range(4 * POSITIONS):
        if state.sampled.tolist() == totals:
            break
        layout(window, [data.draw(st.integers(0, MAX_WINDOW)) for _ in range(SLOTS)])
        rows, drawn = window_rows(state, window, 3 * MAX_WINDOW), []
        fed: dict[int, list[int]] = {}
        for slot, index, valid, token in zip(
            rows.slot.tolist(), rows.index.tolist(), rows.valid.tolist(), rows.token.tolist(), strict=True
        ):
            if not valid:
                drawn.append(WRONG)
                continue
            before = fed.setdefault(slot, state.output[slot, :index].tolist())
            before.append(token)
            assert rows.position[len(drawn)] == PROMPT + index
            drawn.append(function(slot, tuple(before)))
        accept(state, window, rows, torch.tensor(drawn))
        for slot, count in enumerate(state.sampled.tolist()):
            assert state.output[slot, :count].tolist() == want[slot][:count]
            assert state.lengths[slot] == (PROMPT + count - 1 if totals[slot] else 0)
    for slot, total in enumerate(totals):
        if total:
            assert 1 <= state.sampled[slot] <= total


def test_what_a_step_sampled_after_a_wrong_guess_is_the_next_guess(state_of: DecodeState) -> None:
    state, window = state_of, Window.idle(SLOTS, POSITIONS, 8, torch.device("cpu"))
    begin(state, window, 0, 40)
    layout(window, [4])
    rows = window_rows(state, window, 8)
    first = state.output[0, 0].item()
    assert rows.token[:4].tolist() == [first] * 4  # nothing else is known
    accept(state, window, rows, torch.tensor([first + 1, 12, 13, 14, WRONG, WRONG, WRONG, WRONG]))
    assert state.sampled[0] == 2
    assert window.known[0] == 5
    assert window_rows(state, window, 8).token[:4].tolist() == [first + 1, 12, 13, 14]


@pytest.mark.parametrize("target", [Grid(8, 8), Grid(4, 12), Grid(1, 1)])
def test_first_guesses_of_text_to_image(target: Grid) -> None:
    preview = Grid(4, 3)
    command = Admit(0, (1, 2), (preview, target), Sampling(1.0, 1.0, 1), 0)
    sources, _ = first_guesses(command)
    assert sources[: preview.tokens].tolist() == [0, 0, 1, *range(preview.tokens - 3)]
    places = [
        (index // target.width * preview.height // target.height) * preview.width
        + index % target.width * preview.width // target.width
        for index in range(target.tokens)
    ]
    assert sources[preview.tokens :].tolist() == places


def test_first_guesses_of_an_edit_are_the_tokens_of_the_source() -> None:
    target, source = Grid(4, 4), Grid(2, 2)
    prompt = (1, 70, 71, 72, 73, 2)
    command = Admit(0, prompt, (target,), Sampling(1.0, 1.0, 1), 0, (PlacedGrid(1, source),))
    sources, guesses = first_guesses(command)
    assert sources.tolist() == list(range(16))
    assert guesses.tolist() == [70, 70, 71, 71] * 2 + [72, 72, 73, 73] * 2


def test_noise_of_two_windows_is_in_memory() -> None:
    assert 2 * MAX_WINDOW <= NOISE_BLOCK
    noise, want = torch.zeros(NOISE_BLOCK, 7), torch.zeros(200, 7)
    generator = torch.Generator().manual_seed(3)
    for row in want:
        row.exponential_(generator=generator)
    sequence = SlotSequence(torch.Generator().manual_seed(3), total=200)
    for until in (1, 40, 64, 65, 90, 128, 190, 222):
        sequence.draw_noise(noise, until)
        end = min(until, 200)
        for index in range(max(0, end - NOISE_BLOCK), end):
            assert torch.equal(noise[index % NOISE_BLOCK], want[index])
