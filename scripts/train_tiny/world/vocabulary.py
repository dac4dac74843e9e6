"""The words of the world: shapes, colours, places, backgrounds, what signs say."""

from __future__ import annotations

import string
from typing import Final

SHAPES: Final = (
    "circle", "square", "triangle", "star", "ring", "heart", "tree", "house", "fox", "diamond", "cross", "moon"
)  # fmt: skip
CONTAINERS: Final = ("circle", "square", "ring", "heart", "diamond")
"""Shapes with room for another inside."""

Rgb = tuple[int, int, int]
COLOURS: Final[dict[str, Rgb]] = {
    "red": (215, 25, 35),
    "orange": (255, 130, 0),
    "yellow": (250, 215, 0),
    "lime": (140, 230, 20),
    "green": (15, 120, 45),
    "cyan": (0, 190, 205),
    "blue": (25, 55, 220),
    "purple": (120, 25, 165),
    "pink": (255, 75, 175),
    "brown": (125, 70, 25),
    "black": (15, 15, 15),
    "grey": (115, 115, 115),
}
"""Of things: strong colours."""
BACKGROUND_COLOURS: Final[dict[str, Rgb]] = {
    "white": (255, 255, 255),
    "light blue": (150, 200, 255),
    "light green": (160, 235, 165),
    "light yellow": (255, 240, 150),
    "light pink": (255, 185, 205),
    "lavender": (210, 165, 250),
    "light grey": (190, 190, 190),
}
"""Of backgrounds: pale colours, none near a thing's."""

SIZES: Final = ("small", "large")
BACKGROUNDS: Final = ("plain", "gradient", "stripes", "checks")
PLACES: Final = ("middle", "left", "right", "top", "bottom")
"""Where a thing may be that is alone."""
RELATIONS: Final = ("left of", "above", "inside")
"""What the first of several things is to the second, and the second to the third."""
SIGN_PLACES: Final = ("bottom", "top")
MAX_LETTERS: Final = 6
LETTERS: Final = string.ascii_uppercase

WORDS: Final = tuple(
    """
    A I GO HI NO OK ON UP YES NEW BIG RED FOX SUN SEA SKY CAT DOG TEA BUS CAR ZOO FUN JOY HOT ICE EGG KEY MAP BOX HAT
    BEE COW PIG OWL BAT ANT TOY WAX INK OAK PEN CUP JAM PIE NUT FIG NEWS OPEN STOP SALE EXIT TAXI CAFE FREE HOME LOVE
    STAR MOON TREE FISH BIRD CAKE MILK SOUP BOOK GAME PARK ROAD ZERO FIVE KING QUIZ JAZZ HAPPY SMILE HELLO WORLD HOUSE
    LIGHT MUSIC PARTY PIZZA BREAD FRUIT APPLE LEMON MANGO TIGER ZEBRA PANDA HORSE MOUSE OCEAN RIVER CLOUD STORM EARTH
    TRAIN PLANE HOTEL SHOP BANK CLUB ROOM DOOR WAIT SLOW FAST COOL WARM COLD SNOW RAIN WIND FIRE GOLD BLUE PINK GREY
    LIME CLOSED COFFEE BAKERY CINEMA MUSEUM GARDEN FLOWER SUMMER WINTER SPRING SCHOOL SUNDAY MONDAY FRIDAY CHEESE
    BANANA ORANGE YELLOW PURPLE SILVER BRIDGE STREET MARKET OFFICE RABBIT MONKEY TURTLE THANKS PLEASE
    """.split()  # noqa: SIM905 - a list of words is read more easily
)
