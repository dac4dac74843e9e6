"""Scenes in words, English and Chinese, several ways each."""

from __future__ import annotations

from random import Random
from typing import Final

from .scene import Background, Scene, Sign, Thing

LANGUAGES: Final = ("en", "zh")

SHAPES_EN: Final = {
    "circle": ("circle", "disc"),
    "ring": ("ring",),
    "fox": ("fox", "fox face"),
    "moon": ("moon", "crescent moon"),
    "tree": ("tree",),
}
SIZES_EN: Final = {"small": ("small", "little"), "large": ("large", "big")}
SHAPES_ZH: Final = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星星", "ring": "圆环", "heart": "爱心",
    "tree": "树", "house": "房子", "fox": "狐狸", "diamond": "菱形", "cross": "十字", "moon": "月亮",
}  # fmt: skip
COLOURS_ZH: Final = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "lime": "黄绿色", "green": "绿色", "cyan": "青色",
    "blue": "蓝色", "purple": "紫色", "pink": "粉色", "brown": "棕色", "black": "黑色", "grey": "灰色",
    "white": "白色", "light blue": "浅蓝色", "light green": "浅绿色", "light yellow": "浅黄色", "light pink": "浅粉色",
    "lavender": "淡紫色", "light grey": "浅灰色",
}  # fmt: skip
SIZES_ZH: Final = {"small": "小", "large": "大"}
QUOTES: Final = {"en": ("'{}'", '"{}"', "“{}”"), "zh": ("“{}”", "「{}」", "'{}'")}

PLACES_EN: Final = {
    "middle": ("{a}", "{a}", "{a} in the middle", "{a} in the centre"),
    "left": ("{a} on the left", "{a} on the left side"),
    "right": ("{a} on the right", "{a} on the right side"),
    "top": ("{a} at the top", "{a} in the upper half"),
    "bottom": ("{a} at the bottom", "{a} in the lower half"),
}
PAIRS_EN: Final = {
    "left of": (
        "{a} to the left of {b}", "{a} left of {b}", "{b} to the right of {a}", "{a} on the left and {b} on the right"
    ),
    "above": ("{a} above {b}", "{b} below {a}", "{b} under {a}", "{a} on top and {b} below it"),
    "inside": ("{a} inside {b}", "{b} with {a} inside it", "{b} that contains {a}"),
}  # fmt: skip
TRIPLES_EN: Final = {
    "left of": (
        "{a}, {b} and {c} from left to right",
        "{a} left of {b}, which is left of {c}",
        "a row of {a}, {b} and {c}",
    ),
    "above": (
        "{a}, {b} and {c} from top to bottom",
        "{a} above {b}, which is above {c}",
        "a column of {a}, {b} and {c}",
    ),
}
PLACES_ZH: Final = {
    "middle": ("{a}", "{a}", "中间有{a}", "{a}在正中间"),
    "left": ("左边有{a}", "{a}在左边"),
    "right": ("右边有{a}", "{a}在右边"),
    "top": ("上方有{a}", "{a}在上方"),
    "bottom": ("下方有{a}", "{a}在下方"),
}
PAIRS_ZH: Final = {
    "left of": ("{a}在{b}的左边", "{b}在{a}的右边", "左边是{a}，右边是{b}"),
    "above": ("{a}在{b}的上方", "{b}在{a}的下方", "上面是{a}，下面是{b}"),
    "inside": ("{a}在{b}里面", "{b}里面有{a}"),
}
TRIPLES_ZH: Final = {
    "left of": ("从左到右依次是{a}、{b}和{c}", "从左到右有{a}、{b}、{c}"),
    "above": ("从上到下依次是{a}、{b}和{c}", "从上到下有{a}、{b}、{c}"),
}
BACKGROUNDS_EN: Final = {
    "plain": ("on a {a} background", "on a plain {a} background", "against {a}"),
    "gradient": ("on a gradient from {a} to {b}", "on a background that fades from {a} to {b}"),
    "stripes": ("on {a} and {b} stripes", "on a striped background of {a} and {b}"),
    "checks": ("on {a} and {b} checks", "on a checked background of {a} and {b}"),
}
BACKGROUNDS_ZH: Final = {
    "plain": ("{a}背景", "背景是{a}"),
    "gradient": ("从{a}到{b}的渐变背景", "背景从{a}渐变到{b}"),
    "stripes": ("{a}和{b}的条纹背景", "背景是{a}和{b}的条纹"),
    "checks": ("{a}和{b}的格子背景", "背景是{a}和{b}的格子"),
}
SIGNS_EN: Final = (
    "with a sign{where} that says {word}",
    "with a sign{where} saying {word}",
    "and the word {word}{where}",
)
SIGNS_ZH: Final = ("{where}牌子上写着{word}", "{where}有写着{word}的牌子", "{where}文字{word}")
HOLDING_EN: Final = ("holding a sign that says {word}", "reading a newspaper that says {word}")


def caption(scene: Scene, rng: Random, language: str = "en") -> str:
    """Says everything about a scene.

    Args:
        scene: what is on the picture.
        rng: chooses the phrasing.
        language: one of ``LANGUAGES``.
    """
    return _caption_zh(scene, rng) if language == "zh" else _caption_en(scene, rng)


def name(thing: Thing, rng: Random, language: str, size: str = "usual", article: str = "a") -> str:
    """Names a thing.

    Args:
        thing: what it is.
        rng: chooses the words.
        language: one of ``LANGUAGES``.
        size: ``usual`` tells it, though sometimes not that it is large; ``never``.
        article: ``a`` for what is new, ``the`` for what is known.
    """
    tell = size == "usual" and (thing.size == "small" or rng.random() < 0.5)
    if language == "zh":
        size = SIZES_ZH[thing.size] if tell else ""
        return f"{'一个' if article == 'a' else ''}{size}{COLOURS_ZH[thing.colour]}{SHAPES_ZH[thing.shape]}"
    shape = rng.choice(SHAPES_EN.get(thing.shape, (thing.shape,)))
    words = [rng.choice(SIZES_EN[thing.size])] if tell else []
    words += [thing.colour, shape]
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join([article, *words])


def arranged(scene: Scene, names: list[str], rng: Random, language: str) -> str:
    """Says how named things lie to each other, or where the only one is."""
    chinese = language == "zh"
    ways = {
        1: PLACES_ZH if chinese else PLACES_EN,
        2: PAIRS_ZH if chinese else PAIRS_EN,
        3: TRIPLES_ZH if chinese else TRIPLES_EN,
    }[len(names)]
    return rng.choice(ways[scene.relation]).format(**dict(zip("abc", names, strict=False)))


def background_words(background: Background, rng: Random, language: str) -> str:
    """Says what is behind, as ``on a white background``."""
    ways = BACKGROUNDS_ZH if language == "zh" else BACKGROUNDS_EN
    colours = [COLOURS_ZH[colour] if language == "zh" else colour for colour in background.colours]
    return rng.choice(ways[background.kind]).format(**dict(zip("ab", colours, strict=False)))


def quoted(word: str, rng: Random, language: str) -> str:
    """Puts a word into quotes that the model's glyph encoder reads."""
    return rng.choice(QUOTES[language]).format(word)


def _caption_en(scene: Scene, rng: Random) -> str:
    names = [name(thing, rng, "en") for thing in scene.things]
    parts = []
    if scene.background != Background() or rng.random() < 0.5:
        parts.append(background_words(scene.background, rng, "en"))
    if scene.sign:
        parts.append(_sign_en(scene, scene.sign, rng))
    rng.shuffle(parts)
    # What a fox holds comes right after the fox.
    parts.sort(key=lambda part: not part.startswith(("holding", "reading")))
    start = rng.choice(("", "", "a picture of ", "a drawing of ", "an image of "))
    text = " ".join([start + arranged(scene, names, rng, "en"), *parts])
    return text[0].upper() + text[1:] + rng.choice(("", "."))


def _sign_en(scene: Scene, sign: Sign, rng: Random) -> str:
    word = quoted(sign.word, rng, "en")
    if sign.place == "bottom" and len(scene.things) == 1 and (scene.things[0].shape == "fox" or rng.random() < 0.1):
        return rng.choice(HOLDING_EN).format(word=word)
    where = " at the top" if sign.place == "top" else rng.choice(("", "", " at the bottom"))
    return rng.choice(SIGNS_EN).format(where=where, word=word)


def _caption_zh(scene: Scene, rng: Random) -> str:
    names = [name(thing, rng, "zh") for thing in scene.things]
    parts = [arranged(scene, names, rng, "zh")]
    if scene.background != Background() or rng.random() < 0.5:
        parts.insert(rng.randrange(2), background_words(scene.background, rng, "zh"))
    if scene.sign:
        where = "顶部" if scene.sign.place == "top" else rng.choice(("", "", "底部"))
        parts.append(rng.choice(SIGNS_ZH).format(where=where, word=quoted(scene.sign.word, rng, "zh")))
    return rng.choice(("", "", "一张图片：", "画")) + "，".join(parts) + rng.choice(("", "。"))
