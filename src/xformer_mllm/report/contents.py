"""What a report is made from: plain data, every part of which may be empty."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

# What is right without a look at the image: key of a score -> (column of the table, line of the legend).
BLIND = {
    "majority": ("majority", "most frequent training answer to the type of question"),
    "question_only": ("question alone", "most frequent training answer to the same words"),
}


@dataclass(frozen=True)
class Setting:
    """One way of asking: the scores of every variant on the same questions.

    metrics: {variant: {group: {"accuracy", "n", "ci95": [low, high]}}}; a group is "all", a question type,
        "structural:x" or "semantic:x". What is right without looking may be there too: "majority", the most frequent
        training answer to the type of question, and "question_only", that to the question's very words.
    differences: {variant: {group: {"difference", "ci95", "n", "clear"}}}, each variant minus the first one.
    predictions: {variant: [{"id", "image_id", "question", "question_type", "answer", "prediction", "credit"}]}, the
        same questions in the same order for every variant.
    """

    name: str
    note: str
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]
    differences: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    predictions: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One variant's training in one stage.

    log: [{"step", "loss", "itc_loss", ...}]; samples: [{"step", "id", "text", "reference", "question" (optional)}],
    what the model said of the held-out image "id"; freeze: [{"name", "parameters", "trainable"}]; batch_size: pairs
    per step, for the chance lines of ITC.
    """

    variant: str
    stage: str
    log: Sequence[Mapping[str, float]] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    freeze: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None


@dataclass(frozen=True)
class Strip:
    """Images that belong side by side: (label, image); a single one has the page's whole width."""

    title: str
    panels: Sequence[tuple[str, Image.Image]]


@dataclass(frozen=True)
class Report:
    """What the page is made from. `variants[0]` is the one that the others are compared with.

    images: an image by a prediction's "image_id" or a sample's "id"; None where there is none.
    sections: more of them, in HTML.
    provenance: {"Command": "...", "Seed": "...", ...}, printed as it is.
    """

    title: str
    variants: Sequence[str]
    introduction: str = ""
    settings: Sequence[Setting] = ()
    runs: Sequence[Run] = ()
    reconstructions: Sequence[Strip] = ()
    sections: Sequence[str] = ()
    configuration: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    images: Callable[[str], Image.Image | None] = lambda image_id: None
    seed: int = 0


def blind_keys(setting: Setting) -> list[str]:
    """Which of BLIND the setting's scores hold."""
    scores = [score for metrics in setting.metrics.values() for score in metrics.values()]
    return [key for key in BLIND if any(key in score for score in scores)]
