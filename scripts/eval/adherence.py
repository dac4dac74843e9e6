"""Measures how well a model of the drawn world does what prompts say, one JSON object a line.

    adherence.py --checkpoint DIR | --url HOST:PORT [-n 200] [--edits 60] [--size 256x256] [--together 8] [--out FOLDER]

Prompts are ones kept from training. ``pictures`` tells the model's shares of right answers for each property;
``drawings`` what the same judge says of the true drawings: its own accuracy; ``shuffled`` what it says of the model's
pictures for other prompts: chance. ``edits`` tells how often the change asked for is there, and all else kept. A
property's share is of the pictures that were asked for it (``of``). With ``--true-codes`` the second stage is given the
codes of the true drawings, which tells its own faults from the first stage's. With ``--other-words`` prompts are said
as people may who do not know the world's own phrases.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from eval.judge import PROPERTIES, Verdict, judge, judge_edit
from eval.questions import (
    Painter,
    Picture,
    Question,
    Request,
    drawn,
    edit_questions,
    local_painter,
    otherwise,
    scene_questions,
    served_painter,
)
from eval.seeing import Seen, look
from eval.sheets import save_sheet


def shares(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """Returns the share of right pictures for each property, and of how many pictures."""
    right = defaultdict(list)
    for verdict in verdicts:
        for name, value in verdict.items():
            right[name].append(value)
    order = {name: index for index, name in enumerate(PROPERTIES)}
    names = sorted(right, key=lambda name: order.get(name, len(order)))
    return {name: round(float(np.mean(right[name])), 4) for name in names} | {
        "of": {name: len(right[name]) for name in names}
    }


def judge_question(seen: Seen, question: Question) -> Verdict:
    """Judges a picture by what was asked."""
    return judge_edit(seen, question.edit) if question.edit else judge(seen, question.scene)


def baselines(questions: list[Question], seen: list[Seen], request: Request, seed: int) -> dict[str, dict[str, Any]]:
    """Returns the shares for true drawings, and for the model's pictures each judged by another's prompt."""
    truth = [judge_question(look(drawn(question.scene, request)), question) for question in questions]
    # Each picture moves on by at least one, so that none stays with its own prompt.
    by = Random(seed).randrange(1, len(questions)) if len(questions) > 1 else 0
    moved = [judge_question(one, question) for one, question in zip(seen[by:] + seen[:by], questions, strict=True)]
    return {"drawings": shares(truth), "shuffled": shares(moved)}


def edits_by_kind(questions: list[Question], verdicts: list[Verdict]) -> dict[str, dict[str, Any]]:
    """Returns the shares for each kind of edit."""
    kinds = defaultdict(list)
    for question, verdict in zip(questions, verdicts, strict=True):
        if question.edit:
            kinds[question.edit.kind].append(verdict)
    return {kind: shares(of_kind) for kind, of_kind in kinds.items()}


def measure(
    painter: Painter, questions: list[Question], request: Request, together: int = 1
) -> tuple[list[Picture], list[Seen], float]:
    """Returns the pictures, what they show, and the median of the seconds each took, ``together`` at a time."""
    with ThreadPoolExecutor(together) as threads:
        answers = list(threads.map(lambda question: painter(question, request), questions))
    pictures = [picture for picture, _ in answers]
    return pictures, [look(picture) for picture in pictures], float(np.median([seconds for _, seconds in answers]))


def questions_of(asked: argparse.Namespace) -> dict[str, list[Question]]:
    """Returns what is asked for, by the name of the measure."""
    questions = {
        "pictures": scene_questions(asked.n, asked.seed),
        "edits": edit_questions(asked.edits, asked.seed),
    }
    return {name: otherwise(own, asked.seed) if asked.other_words else own for name, own in questions.items()}


def say(what: str, **values: Any) -> None:
    print(json.dumps({"measure": what, **values}, ensure_ascii=False), flush=True)


def run(painter: Painter, asked: argparse.Namespace, request: Request) -> None:
    """Asks, judges and tells; the wrong ones in words, and as a sheet if there is a folder for it."""
    for name, questions in questions_of(asked).items():
        if not questions:
            continue
        pictures, seen, seconds = measure(painter, questions, request, asked.together)
        verdicts = [judge_question(one, question) for one, question in zip(seen, questions, strict=True)]
        say(name, **shares(verdicts), seconds=round(seconds, 3))
        for baseline, values in baselines(questions, seen, request, asked.seed).items():
            say(baseline if name == "pictures" else f"{name}_{baseline}", **values)
        for kind, values in edits_by_kind(questions, verdicts).items():
            say("edits_of_a_kind", kind=kind, **values)
        for question, verdict in zip(questions, verdicts, strict=True):
            wrong = [prop for prop, right in verdict.items() if not right]
            if wrong and asked.tell_wrong:
                say("wrong", prompt=question.prompt, seed=question.seed, properties=wrong)
        if asked.out:
            save_sheet(asked.out, name, questions, pictures, verdicts, request)


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Request]:
    parser = argparse.ArgumentParser(prog="adherence.py", description="Measures how well pictures follow prompts.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--checkpoint", type=Path, metavar="DIR", help="painted by the engines in this process")
    where.add_argument("--url", metavar="HOST:PORT", help="painted by a server")
    add_request_arguments(parser)
    parser.add_argument("--true-codes", action="store_true", help="the second stage alone, given true drawings' codes")
    parser.add_argument("--other-words", action="store_true", help="prompts otherwise than the world says them")
    parser.add_argument("--together", type=int, default=1, help="requests in flight (%(default)s)")
    parser.add_argument("--tell-wrong", action="store_true", help="a line for each picture that is not all right")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="saves the pictures, and sheets with what is wrong")
    asked = parser.parse_args(arguments)
    if asked.true_codes and asked.url:
        parser.error("--true-codes: the engines must be in this process; allowed with --checkpoint only")
    return asked, request_of(asked)


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what every evaluation is asked."""
    parser.add_argument("--device", default="auto", help="of the engines (%(default)s)")
    parser.add_argument("-n", type=int, default=200, help="prompts (%(default)s)")
    parser.add_argument("--edits", type=int, default=60, help="edits (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and pictures (%(default)s)")
    parser.add_argument("--size", default="256x256", metavar="WxH")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.5)


def request_of(asked: argparse.Namespace) -> Request:
    """Returns the request that the arguments describe."""
    width, height = map(int, asked.size.split("x"))
    return Request(height, width, asked.steps, asked.guidance)


def main() -> None:
    asked, request = parse_arguments()
    local = partial(local_painter, asked.checkpoint, asked.device, true_codes=asked.true_codes)
    with served_painter(asked.url) if asked.url else local() as painter:
        run(painter, asked, request)


if __name__ == "__main__":
    main()
