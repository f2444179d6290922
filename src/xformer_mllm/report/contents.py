"""The data of a report. Every part may be empty."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

# Baselines that do not see the image: key of a score -> (column of the table, line of the legend).
BLIND = {
    "majority": ("majority", "most frequent training answer to the type of question"),
    "question_only": ("question alone", "most frequent training answer to the same words"),
}


@dataclass(frozen=True)
class Setting:
    """The scores of every variant on the same questions.

    metrics: {variant: {group: {"accuracy", "n", "ci95": [low, high]}}}, optionally with the accuracy of the baselines in
        BLIND; a group is "all", a question type, "structural:x" or "semantic:x".
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
    the texts generated for the held-out image "id"; freeze: [{"name", "parameters", "trainable"}]; batch_size: pairs
    per step, for the chance levels of ITC.
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
    """A row of labelled images, (label, image). A single image takes the whole width."""

    title: str
    panels: Sequence[tuple[str, Image.Image]]


@dataclass(frozen=True)
class QueryAnalysis:
    """The queries of one or more models over the same images.

    models: {name: {"folder", "stage": "stage 1" or "stage 2", "queries": number of queries, "scores": {metric: {"mean",
        "ci95": [low, high] or None}}}}; the others are compared with the first.
    differences: {name: {metric: {"difference", "ci95", "clear"}}}, each model minus the first.
    definitions: {metric: definition}, in the order of display.
    image_count: number of images that the scores are computed on.
    overlays: (id of the image, image with heat maps).
    """

    models: Mapping[str, Mapping[str, Any]]
    differences: Mapping[str, Mapping[str, Mapping[str, Any]]]
    definitions: Mapping[str, str]
    image_count: int
    overlays: Sequence[tuple[str, Image.Image]] = field(default_factory=tuple)


@dataclass(frozen=True)
class Report:
    """The data of the page. The other variants are compared with `variants[0]`.

    images: returns the image of a prediction's "image_id" or a sample's "id", or None.
    provenance: {"Command": "...", "Seed": "...", ...}, printed as is.
    """

    title: str
    variants: Sequence[str]
    introduction: str = ""
    settings: Sequence[Setting] = ()
    runs: Sequence[Run] = ()
    reconstructions: Sequence[Strip] = ()
    queries: QueryAnalysis | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    images: Callable[[str], Image.Image | None] = lambda image_id: None
    seed: int = 0


def blind_keys(setting: Setting) -> list[str]:
    """The keys of BLIND that the setting's scores have."""
    scores = [score for metrics in setting.metrics.values() for score in metrics.values()]
    return [key for key in BLIND if any(key in score for score in scores)]
