"""Rendering of a checkpoint's chat template in a process of its own, whose time and memory are limited.

The sandbox of Jinja keeps a template away from everything but its inputs; it does not end one that loops, nor one that
makes a string of gigabytes.
"""

from __future__ import annotations

import datetime
import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from glm_image.errors import CheckpointError, shown
from glm_image.ipc.child import child_environment, python_program

CPU_SECONDS = 5
MEMORY_BYTES = 512 * 2**20
RENDERED_CHARACTERS = 100_000
"""Limits of all renderings of a template together; the published one takes a millisecond and 100 characters."""

START_SECONDS = 120
"""For the process to start and end on a machine that is busy."""


def render(template: str, chats: Sequence[Any], variables: Mapping[str, Any]) -> list[str]:
    """Renders a Jinja template for each chat, a list of messages, as transformers' ``apply_chat_template`` does.

    ``variables`` are the special tokens by their names.

    Raises:
        CheckpointError: the template is malformed, or exceeds a limit.
    """
    question = json.dumps(
        {"template": template, "chats": chats, "variables": dict(variables), "cpu_seconds": CPU_SECONDS}
    )
    return list(_answer(question))


@lru_cache(maxsize=16)  # engines in one process mostly have the same template
def _answer(question: str) -> tuple[str, ...]:
    command = [python_program(), "-m", __name__]
    try:
        done = subprocess.run(
            command,
            input=question.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_environment(),
            timeout=START_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _error(f"rendering it took more than {START_SECONDS} s") from None
    if done.returncode < 0:  # killed by the limit of time, or for its memory
        raise _error(f"rendering it took more than {CPU_SECONDS} s of CPU time or {MEMORY_BYTES >> 20} MiB of memory")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise _error(f"its process ended with {done.returncode}") from None
    if "error" in answer:
        raise _error(answer["error"])
    return tuple(answer["rendered"])


def _error(reason: str) -> CheckpointError:
    return CheckpointError(f"processor/chat_template: cannot be rendered: {reason}")


def main() -> None:
    """Answers one question of ``render``, from standard input to standard output."""
    question = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (question["cpu_seconds"],) * 2)
    try:
        answer: dict[str, Any] = {"rendered": _rendered(question)}
    except MemoryError:
        answer = {"error": f"it takes more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:
        answer = {"error": shown(f"{type(error).__name__}: {error}")}
    json.dump(answer, sys.stdout)


def _rendered(question: Mapping[str, Any]) -> list[str]:
    # The environment of transformers' _cached_compile_jinja_template, without its tag for training.
    from jinja2.exceptions import TemplateError  # noqa: PLC0415 - only the child needs it
    from jinja2.ext import loopcontrols  # noqa: PLC0415
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    template = environment.from_string(question["template"])
    rendered, characters = [], 0
    for chat in question["chats"]:
        pieces = []
        variables = {**question["variables"], "tools": None, "documents": None, "add_generation_prompt": False}
        for piece in template.generate({**variables, "messages": chat}):
            characters += len(piece)
            if characters > RENDERED_CHARACTERS:
                raise ValueError(f"it renders more than {RENDERED_CHARACTERS} characters")
            pieces.append(piece)
        rendered.append("".join(pieces))
    return rendered


if __name__ == "__main__":
    main()
