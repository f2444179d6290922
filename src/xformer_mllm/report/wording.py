"""Text for names, numbers and tables."""

import re
from collections.abc import Sequence

DISPLAY_NAMES = {"qformer": "Q-Former", "xformer": "X-Former"}

QUESTION_TYPES = {
    "above": "is one object above another?",
    "colour": "the colour of the only object of its shape",
    "compare": "are there more objects of one shape than of another?",
    "compare_texture": "do two objects have the same texture?",
    "count": "the number of objects of one shape",
    "count_all": "the number of all objects",
    "count_texture": "the number of objects with one texture",
    "exists": "is there an object of this colour and shape?",
    "exists_colour": "is there an object of this colour?",
    "exists_shape": "is there an object of this shape?",
    "exists_texture": "does an object that is in the image have this texture?",
    "ground": "the texture of the background",
    "left_right": "is one object left or right of another?",
    "logical": "are both of two objects, or at least one of them, in the image?",
    "shape": "the shape of the only object of its colour",
    "size": "is an object small or large?",
    "texture": "the texture of one object",
}


def display_name(variant: str) -> str:
    """`early_cross_attention` -> `early cross attention`; the two main variants as the paper writes them."""
    return DISPLAY_NAMES.get(variant, variant.replace("_", " "))


def image_name(image_id: str) -> str:
    """An image as the commands take it: "0/test/3" (seed, split, index) -> "scene:test:3"; other ids as they are."""
    scene = re.fullmatch(r"0/(train|validation|test)/(\d+)(/\d+)?", image_id)
    return f"scene:{scene[1]}:{scene[2]}" if scene else image_id


def signed(value: float, form: str = ".3f") -> str:
    """A number with a real minus sign."""
    return f"{value:{form}}".replace("-", "−")


def percent(value: float) -> str:
    """0.7564 -> '75.6 %' with a no-break space."""
    return f"{100 * value:.1f}\u00a0%"


def points(difference: float) -> str:
    """0.0991 -> '+9.9'."""
    return signed(100 * difference, "+.1f")


def points_interval(interval: Sequence[float]) -> str:
    """[0.0913, 0.107] -> '+9.1 to +10.7'."""
    return f"{points(interval[0])} to {points(interval[1])}"


def share(value: float | None) -> str:
    """0.7564 -> '75.6'; an en dash for None."""
    return "–" if value is None else f"{100 * value:.1f}"


def percent_interval(interval: Sequence[float]) -> str:
    """[0.0913, 0.107] -> '9.1–10.7'."""
    return f"{share(interval[0])}–{share(interval[1])}"


def plain(group: str) -> str:
    """'exists_with_texture' -> 'exists with texture'."""
    return group.replace("_", " ")


def definitions(groups: Sequence[str]) -> dict[str, str]:
    """What the question types among the groups ask, in the same order."""
    return {plain(group): QUESTION_TYPES[group] for group in groups if group in QUESTION_TYPES}


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a text table: the first column left-aligned, the others right-aligned."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
