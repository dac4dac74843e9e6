"""Captions and instructions in other words: what people write who do not know the world's own phrases.

``caption`` and ``edits`` say everything in a few ways; here parts of what they said are said otherwise. Of what is in
quotes, a word of capitals, nothing changes but these: signs have no small letters, whatever the prompt has. What is
"next to" another is left of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from random import Random
from typing import Final

STARTS: Final = (
    "a", "draw a", "Draw a", "Paint a", "Please draw a", "A photo of a", "Show me a", "An illustration of a"
)  # fmt: skip
COLOUR: Final = r"((?!plain|striped|checked)(?:light )?\w+)"

FIRST: Final = r"(?:(?:A picture of|A drawing of|An image of) a|A)"
SEEN: Final = r"(?<!it)(?<!everything)(?<!:)"
"""Before a background that is not asked for by itself."""
QUOTED: Final = r"(['\"“][A-Z]+['\"”])"

RULES: Final = tuple(
    (re.compile(pattern), ways)
    for pattern, ways in (
        # The order of what is said.
        (rf"^{FIRST}(n?) (.+) on a (?:plain )?{COLOUR} background(.*)$", (r"On a \3 background, a\1 \2\4",)),
        (
            rf"^{FIRST}(n?) (.+) with a sign (?:that says|saying) {QUOTED}(.*)$",
            (r"A sign that says \3 and a\1 \2\4", r"A sign with \3 below a\1 \2\4"),
        ),
        # How a caption begins, and an instruction.
        (rf"^{FIRST}(?=n? )", STARTS),
        (r"^(?:Remove|Take away|Delete) ", ("Erase ", "Get rid of ", "Please remove ", "remove ")),
        (r"^(?:Make|Turn|Paint) (?=the (?!sign))", ("Colour ", "make ", "Please make ")),
        (r"^Change (the (?!word|background).+) to ", (r"Change the colour of \1 to ", r"Recolour \1 to ")),
        (r"^(?:Add|Put) (?=an? )", ("Draw ", "Insert ", "Place ", "Please add ", "add ")),
        (r"^(?:Move|Put) (?=the )", ("Shift ", "Place ", "Please move ", "move ")),
        (r"^Swap (.+) and (.+)$", (r"Exchange \1 and \2", r"Let \1 and \2 trade places")),
        (r"^(?:Put everything|Change the background:|Show it) ", ("Put it ", "Place everything ", "New background: ")),
        (r"^Change the word to ", ("Change the text to ", "The sign shall say ", "Replace the text by ")),
        (r"^Make the sign say ", ("Let the sign read ", "Write on the sign: ")),
        # Where things are.
        (r" to the left of (?=an? )", (" next to ", " beside ", " left of ")),
        (r" to the left of (?=the )", (" left of ", " on the left of ")),
        (r" to the right of ", (" right of ", " on the right of ")),
        (r" above (?=an? |the )", (" over ", " on top of ")),
        (r" (?:below|under) (?=an? |the )", (" beneath ", " underneath ")),
        (r" inside (?=an? )", (" in ", " within ", " in the middle of ")),
        (r" that contains ", (" around ",)),
        (r" in the (?:middle|centre)(?! of)", (" in the center", " at the center", ", centred")),
        (r" on the (left|right)(?: side)?(?= |$|\.)(?! of)", (r" at the \1", r" on the \1 edge", r" to the \1")),
        (r" in the (upper|lower) half", (r" in the \1 part",)),
        # Signs.
        (
            r" with a sign(?: at the bottom)? (?:that says|saying) ",
            (" above a sign that says ", " and a sign that reads ", " with the text ", " above the word ", " with "),
        ),
        (r" with a sign at the top (?:that says|saying) ", (" below a sign that says ", " under a sign that reads ")),
        (r" and the word ", (" and the text ", " with the word ", " and the letters ")),
        (r" holding a sign that says ", (" holding up a sign with ", " that holds a sign saying ")),
        (r" reading a newspaper that says ", (" with a newspaper called ", " reading the newspaper ")),
        # Backgrounds.
        (
            rf"{SEEN} on a (?:plain )?{COLOUR} background",
            (r" with a \1 background", r" in front of \1", r", \1 background"),
        ),
        (rf"{SEEN} against {COLOUR}", (r" on \1", r" against a \1 background")),
        (
            rf"{SEEN} on a gradient from {COLOUR} to {COLOUR}",
            (r" on a \1 to \2 gradient", r", background from \1 to \2"),
        ),
        (
            rf"{SEEN} on {COLOUR} and {COLOUR} stripes",
            (r" with \1 and \2 stripes behind", r" in front of \1 and \2 stripes"),
        ),
        (rf" on {COLOUR} and {COLOUR} checks", (r" on a \1 and \2 checkerboard",)),
        # Things.
        (r"\bfox(?: face)?\b", ("face of a fox", "fox head", "head of a fox")),
        (r"\bdisc\b", ("dot", "round disc")),
        (r"\bstar\b", ("five-pointed star",)),
        (r"\btree\b", ("fir tree", "pine", "Christmas tree")),
        (r"\bhouse\b", ("home", "cottage")),
        (r"\bheart\b", ("love heart", "heart shape")),
        (r"\bcross\b", ("plus",)),
        (r"\bdiamond\b", ("rhombus",)),
        (r"\bring\b", ("hoop",)),
        (r"\b(?:small|little)\b", ("tiny", "small")),
        (r"\b(?:large|big)\b", ("huge", "big")),
        (r"\bgrey\b", ("gray",)),
        (r"\bpurple\b", ("violet",)),
        (r"\bcyan\b", ("turquoise",)),
        (r"\blight (?=[a-z])", ("pale ",)),
        # Chinese.
        (r"^(?:一张图片：|画)?(?=一个|左边|右边|上|下|中间|从)", ("请画", "帮我画", "图中", "画一幅画：")),
        (r"^(?=把|将|去掉|删除|换成|改为|让|在)", ("请", "帮我")),
        (r"色(?=圆|正|三|星|爱|树|房|狐|菱|十|月)", ("色的",)),
        (r"一个(?=[^一，、和在的]{0,5}狐狸)", ("一只",)),
        (r"牌子上写着", ("招牌上写着", "标牌上写着", "牌子写")),
        (r"文字", ("字样", "写着")),
        (r"的(左|右)边", (r"\1侧", r"的\1侧", r"\1面")),
        (r"的(上|下)方", (r"\1面", r"\1边", r"的\1面")),
        (r"里面", ("内部", "中间")),
        (r"背景是", ("背景为", "背景用")),
        (r"正方形", ("方块", "方形")),
        (r"星星", ("五角星",)),
        (r"爱心", ("心形", "心")),
        (r"十字", ("加号",)),
        (r"房子", ("屋子",)),
        (r"月亮", ("月牙",)),
    )
)  # fmt: skip
"""What may be said otherwise, and how; in this order."""
ARTICLES: Final = re.compile(r"\b(?:an?|the) (?=[a-z])")
CAPITALS: Final = re.compile(r"(?<=['\"“「])[A-Z]+(?=['\"”」])")
AS_IT_IS, OTHERWISE, WITHOUT_ARTICLES, IN_SMALL_LETTERS = 0.5, 0.5, 0.15, 0.3


def paraphrased(text: str, rng: Random) -> str:
    """Says a caption or an instruction in other words, half of the time.

    Args:
        text: as ``caption`` and ``edits`` say it.
        rng: chooses what is said otherwise, and how.
    """
    return text if rng.random() < AS_IT_IS else in_other_words(text, rng)


def in_other_words(text: str, rng: Random) -> str:
    """Says each part that can be said otherwise so half of the time."""
    for pattern, ways in RULES:
        text = pattern.sub(partial(_said, ways, rng), text)
    if rng.random() < IN_SMALL_LETTERS:
        small = rng.choice((str.lower, str.capitalize))
        text = CAPITALS.sub(lambda found: small(found[0]), text)
    return ARTICLES.sub("", text) if rng.random() < WITHOUT_ARTICLES else text


def _said(ways: Sequence[str], rng: Random, found: re.Match[str]) -> str:
    return found.expand(rng.choice(ways)) if rng.random() < OTHERWISE else found[0]
