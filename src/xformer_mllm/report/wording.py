"""How names and numbers are written: no markup, no report."""

from collections.abc import Sequence

DISPLAY_NAMES = {"qformer": "Q-Former", "xformer": "X-Former"}


def display_name(variant: str) -> str:
    """`early_cross_attention` -> `early cross attention`; the two main variants as the paper writes them."""
    return DISPLAY_NAMES.get(variant, variant.replace("_", " "))


def percent(share: float) -> str:
    """0.7564 -> '75.6 %', which no line break divides."""
    return f"{100 * share:.1f}\u00a0%"


def points(difference: float) -> str:
    """0.0991 -> '+9.9'; a real minus sign for negative ones."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def points_interval(interval: Sequence[float]) -> str:
    """[0.0913, 0.107] -> '+9.1 to +10.7'."""
    return f"{points(interval[0])} to {points(interval[1])}"


def plain(group: str) -> str:
    """'exists_with_texture' -> 'exists with texture'."""
    return group.replace("_", " ")
