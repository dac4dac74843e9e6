"""Measures prompt adherence on rendered scenes; prints JSON lines.

    adherence.py --checkpoint DIR | --url HOST:PORT [-n 200] [--edits 60] [--size 256x256] [--together 8] [--out FOLDER]

The prompts were held out of the training. ``pictures`` has the model's share of correct answers for each property,
``drawings`` the judge's own accuracy on the true drawings, and ``shuffled`` the shares that pictures of other prompts
reach by chance. ``edits`` has the share of edits that made the requested change and kept everything else. A property's
share is over the pictures whose prompt names the property (``of``). ``--true-codes`` gives the DiT the codes of the
true drawings, which separates its errors from those of the AR. ``--other-words`` paraphrases the prompts.
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
    ImageGenerator,
    Picture,
    Question,
    Request,
    edit_questions,
    local_generator,
    otherwise,
    rendered,
    scene_questions,
    served_generator,
)
from eval.seeing import Seen, look
from eval.sheets import save_sheet


def shares(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """Returns each property's share of correct images, and the number of images."""
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
    """Judges an image by its question."""
    return judge_edit(seen, question.edit) if question.edit else judge(seen, question.scene)


def baselines(questions: list[Question], seen: list[Seen], request: Request, seed: int) -> dict[str, dict[str, Any]]:
    """Returns the shares for true renderings, and for the model's images judged by other prompts."""
    truth = [judge_question(look(rendered(question.scene, request)), question) for question in questions]
    # Shifted by at least one, so that no image is judged by its own prompt.
    by = Random(seed).randrange(1, len(questions)) if len(questions) > 1 else 0
    moved = [
        judge_question(contents, question) for contents, question in zip(seen[by:] + seen[:by], questions, strict=True)
    ]
    return {"drawings": shares(truth), "shuffled": shares(moved)}


def edits_by_kind(questions: list[Question], verdicts: list[Verdict]) -> dict[str, dict[str, Any]]:
    """Returns the shares for each kind of edit."""
    kinds = defaultdict(list)
    for question, verdict in zip(questions, verdicts, strict=True):
        if question.edit:
            kinds[question.edit.kind].append(verdict)
    return {kind: shares(of_kind) for kind, of_kind in kinds.items()}


def measure(
    generator: ImageGenerator, questions: list[Question], request: Request, together: int = 1
) -> tuple[list[Picture], list[Seen], float]:
    """Returns the images, their contents, and the median seconds per image, with ``together`` requests in flight."""
    with ThreadPoolExecutor(together) as threads:
        answers = list(threads.map(lambda question: generator(question, request), questions))
    pictures = [picture for picture, _ in answers]
    return pictures, [look(picture) for picture in pictures], float(np.median([seconds for _, seconds in answers]))


def questions_of(flags: argparse.Namespace) -> dict[str, list[Question]]:
    """Returns the questions by the name of their measure."""
    questions = {
        "pictures": scene_questions(flags.n, flags.seed),
        "edits": edit_questions(flags.edits, flags.seed),
    }
    return {name: otherwise(own, flags.seed) if flags.other_words else own for name, own in questions.items()}


def say(what: str, **values: Any) -> None:
    print(json.dumps({"measure": what, **values}, ensure_ascii=False), flush=True)


def run(generator: ImageGenerator, flags: argparse.Namespace, request: Request) -> None:
    """Generates, judges and prints; describes wrong images, and saves a sheet if a folder is given."""
    for name, questions in questions_of(flags).items():
        if not questions:
            continue
        pictures, seen, seconds = measure(generator, questions, request, flags.together)
        verdicts = [judge_question(contents, question) for contents, question in zip(seen, questions, strict=True)]
        say(name, **shares(verdicts), seconds=round(seconds, 3))
        for baseline, values in baselines(questions, seen, request, flags.seed).items():
            say(baseline if name == "pictures" else f"{name}_{baseline}", **values)
        for kind, values in edits_by_kind(questions, verdicts).items():
            say("edits_of_a_kind", kind=kind, **values)
        for question, verdict in zip(questions, verdicts, strict=True):
            wrong = [prop for prop, right in verdict.items() if not right]
            if wrong and flags.tell_wrong:
                say("wrong", prompt=question.prompt, seed=question.seed, properties=wrong)
        if flags.out:
            save_sheet(flags.out, name, questions, pictures, verdicts, request)


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Request]:
    parser = argparse.ArgumentParser(prog="adherence.py", description="Measures how well pictures follow prompts.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--checkpoint", type=Path, metavar="DIR", help="uses the engines in this process")
    where.add_argument("--url", metavar="HOST:PORT", help="uses a server")
    add_request_arguments(parser)
    parser.add_argument("--true-codes", action="store_true", help="the DiT alone, given the codes of true renderings")
    parser.add_argument("--other-words", action="store_true", help="paraphrased prompts")
    parser.add_argument("--together", type=int, default=1, help="requests in flight (%(default)s)")
    parser.add_argument("--tell-wrong", action="store_true", help="print a line for each wrong image")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="save the images, and sheets that mark errors")
    flags = parser.parse_args(arguments)
    if flags.true_codes and flags.url:
        parser.error("--true-codes: the engines must be in this process; allowed with --checkpoint only")
    return flags, request_of(flags)


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that all evaluations share."""
    parser.add_argument("--device", default="auto", help="the engines' device (%(default)s)")
    parser.add_argument("-n", type=int, default=200, help="prompts (%(default)s)")
    parser.add_argument("--edits", type=int, default=60, help="edits (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and images (%(default)s)")
    parser.add_argument("--size", default="256x256", metavar="WxH")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.5)


def request_of(flags: argparse.Namespace) -> Request:
    """Returns the request that the arguments describe."""
    width, height = map(int, flags.size.split("x"))
    return Request(height, width, flags.steps, flags.guidance)


def main() -> None:
    flags, request = parse_arguments()
    local = partial(local_generator, flags.checkpoint, flags.device, true_codes=flags.true_codes)
    with served_generator(flags.url) if flags.url else local() as generator:
        run(generator, flags, request)


if __name__ == "__main__":
    main()
