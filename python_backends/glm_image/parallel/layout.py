"""How the ranks of a DiT instance split a denoising step."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from glm_image.errors import ConfigurationError

MEMBERS = ("cfg", "tp", "ring", "ulysses")
ALLOWED = "none, auto, or of cfg=2, tp=N, ring=N, ulysses=N those that multiply to the number of devices"


@dataclass(frozen=True)
class ParallelLayout:
    """The degree of each kind of parallelism; their product is the number of ranks.

    Attributes:
        cfg: 2 = the conditional and the unconditional branch on different ranks.
        tp: tensor parallelism: splits heads and the MLP's width (Shoeybi et al., 2019).
        ring: ring attention: splits the tokens, keys and values circulate (Liu et al., 2023).
        ulysses: splits the tokens, exchanged for heads at attention (Jacobs et al., 2023).
    """

    cfg: int = 1
    tp: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def size(self) -> int:
        return math.prod(getattr(self, member) for member in MEMBERS)

    @classmethod
    def parse(cls, text: str, devices: int) -> ParallelLayout:
        """Parses the parameter ``parallel`` of an instance with ``devices`` devices.

        Raises:
            ConfigurationError: the text has another form, or the layout another number of ranks.
        """
        stripped = text.strip()
        if stripped in {"none", "auto", ""}:
            if stripped == "none" and devices > 1:
                raise ConfigurationError(
                    f"parallel is 'none', but the instance has {devices} devices; allowed: {ALLOWED}"
                )
            return cls.auto(devices)
        ways: dict[str, int] = {}
        for part in stripped.split(","):
            match = re.fullmatch(r"\s*(cfg|tp|ring|ulysses)\s*=\s*([1-9]\d?)\s*", part)
            if match is None or match[1] in ways:
                raise ConfigurationError(f"parallel is {text!r}; allowed: {ALLOWED}")
            ways[match[1]] = int(match[2])
        layout = cls(**ways)
        if layout.cfg > 2 or layout.size != devices:  # noqa: PLR2004 - guidance has two branches
            raise ConfigurationError(
                f"parallel is {text!r}, which takes {layout.size} devices, and the instance has {devices}; "
                f"allowed: {ALLOWED}"
            )
        return layout

    @classmethod
    def auto(cls, devices: int) -> ParallelLayout:
        """Splits the branches first, which communicates least, then the tokens."""
        cfg = 2 if devices % 2 == 0 else 1
        return cls(cfg=cfg, ulysses=devices // cfg)

    def members(self, name: str) -> list[tuple[int, ...]]:
        """Returns the groups of one kind of parallelism as ranks; ulysses is innermost, cfg outermost."""
        stride = math.prod(getattr(self, inner) for inner in MEMBERS[MEMBERS.index(name) + 1 :])
        ways = getattr(self, name)
        firsts = [rank for rank in range(self.size) if rank // stride % ways == 0]
        return [tuple(first + stride * step for step in range(ways)) for first in firsts]


def check_heads(heads: int, tp: int, ulysses: int) -> None:
    """Raises ConfigurationError if a transformer's heads cannot be split."""
    if heads % (tp * ulysses):
        raise ConfigurationError(
            f"parallel has tp={tp} and ulysses={ulysses}; allowed: what divides the transformer's {heads} heads"
        )
