"""Settings of the safety hook."""

from __future__ import annotations

from dataclasses import dataclass

from glm_image.request.declaration import choice, optional, whole


@dataclass(frozen=True, kw_only=True)
class SafetySettings:
    """Which hook checks prompts and images, and what happens if it fails."""

    safety: str = optional(
        "Class that checks prompts before any compute and images before they are encoded; see "
        "[safety hooks](provenance.md#safety-hooks). Set it alike for both stages.",
        allowed="MODULE:CLASS",
        pattern=r"[A-Za-z_][\w.]*:[A-Za-z_]\w*",
    )
    safety_source: str = optional(
        "Path that the class of `safety` gets as its argument `source`, such as a word list or the folder of a "
        "classifier.",
        allowed="a path",
    )
    safety_timeout_ms: int = whole(2000, "Time limit of one check.", low=1, unit="ms")
    safety_on_failure: str = choice(
        "refuse",
        ("refuse", "allow"),
        "What follows when a check raises an exception or exceeds its time limit: `refuse` (fail closed) answers "
        "UNAVAILABLE, `allow` (fail open) goes on.",
    )
