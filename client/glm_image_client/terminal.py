"""Inline images in terminals that can show them."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Final, Literal

Protocol = Literal["iterm2", "kitty"]

ITERM2_PROGRAMS: Final = {"iTerm.app", "WezTerm", "mintty"}
KITTY_PROGRAMS: Final = {"ghostty", "kitty"}
KITTY_CHUNK: Final = 4096
COLUMNS: Final = 32


def protocol_of(environment: Mapping[str, str]) -> Protocol | None:
    """Returns the inline image protocol of the terminal that an environment describes; None = none is known."""
    if environment.get("TMUX") or environment.get("STY"):  # these forward neither protocol
        return None
    program = environment.get("TERM_PROGRAM", "")
    if "KITTY_WINDOW_ID" in environment or environment.get("TERM") == "xterm-kitty" or program in KITTY_PROGRAMS:
        return "kitty"
    if program in ITERM2_PROGRAMS or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return None


def shown(png: bytes, protocol: Protocol) -> str:
    """Returns the escape sequence that shows a PNG file ``COLUMNS`` wide, and a new line.

    As in https://iterm2.com/documentation-images.html and https://sw.kovidgoyal.net/kitty/graphics-protocol.
    """
    text = base64.b64encode(png).decode()
    if protocol == "iterm2":
        return f"\033]1337;File=inline=1;size={len(png)};width={COLUMNS};preserveAspectRatio=1:{text}\a\n"
    return "".join(_kitty_parts(text)) + "\n"


def _kitty_parts(text: str) -> Iterator[str]:
    for begin in range(0, len(text), KITTY_CHUNK):
        control = f"a=T,f=100,q=2,c={COLUMNS}," if begin == 0 else ""
        more = int(begin + KITTY_CHUNK < len(text))
        yield f"\033_G{control}m={more};{text[begin : begin + KITTY_CHUNK]}\033\\"
