"""A run's training data and a few held-out images, from the name of a source.

`scenes`, `photographs` and `easy-vqa` come with the package or an extra; `data/sources.py` opens every other source.
"""

import dataclasses
import random
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset

from xformer_mllm import defaults
from xformer_mllm.commands import DATA
from xformer_mllm.data.records import Images
from xformer_mllm.data.sources import SOURCE_FORMS, open_captions, open_questions, source_exists
from xformer_mllm.data.streams import Stream
from xformer_mllm.data.transforms import EvalTransform, TrainTransform
from xformer_mllm.train.config import SCENES_SIZE, RunConfig, Stage2Config

HELD_OUT_IMAGES = 4

Records = list[dict[str, Any]]


class FirstOf(Subset):
    """The first `size` images of a data set, with captions and crops resampled each epoch."""

    def __init__(self, dataset: Any, size: int):
        super().__init__(dataset, range(size))

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def text_lengths(self) -> list[int]:
        return self.dataset.text_lengths()[: len(self)]  # type: ignore[attr-defined]


class NotDecoded:
    """Replaces the transform where an image's features are cached: only the header of its file is read."""

    size = 0

    def __call__(self, image: Image.Image, rng: random.Random) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)


def captions(config: RunConfig, image_size: int) -> tuple[Dataset, Records]:
    """Images with captions for training, and a few held-out ones.

    Args:
        config: names the source.
        image_size: side of the model's input, in pixels.

    Raises FileNotFoundError or ValueError as `data/sources.py`.
    """
    if config.data in DATA:
        train = defaults.captions(config.data, "train", config.train_size or SCENES_SIZE)
        return _at_most(train, config), _first(defaults.captions(config.data, "validation", HELD_OUT_IMAGES), train)
    _check_name(config.data)
    cleaned = config.clean_captions
    train = open_captions(config.data, "train", **_how(config, image_size), cleaned=cleaned)
    held_out = open_captions(config.data, "validation", images=config.images, cleaned=cleaned)
    return _at_most(train, config), _first(held_out, train)


def questions(config: Stage2Config, image_size: int) -> tuple[Dataset, Records]:
    """Questions with answers for training, grouped by image, and one about each of a few held-out images."""
    each = config.questions_per_image
    if config.data in DATA:
        train = defaults.questions(config.data, "train", config.train_size or SCENES_SIZE, each)
        held_out = defaults.questions(config.data, "validation", HELD_OUT_IMAGES, 1)
        return _at_most(train, config), [image[0] for image in _first(held_out, train)]
    _check_name(config.data)
    train = open_questions(config.data, "train", **_how(config, image_size), questions_per_image=each)
    held_out = open_questions(config.data, "validation", images=config.images)
    return _at_most(train, config), [image[0] for image in _first(held_out, train)]


def _check_name(data: str) -> None:
    """Raise FileNotFoundError that also names the sources of the package, which `data/sources.py` does not know."""
    if not source_exists(data):
        raise FileNotFoundError(f"{data}: no such data source; expected {', '.join(DATA)}, {SOURCE_FORMS}")


def undecoded(dataset: Any, broken: dict[str, str]) -> Any:
    """The same images without decoding them. broken: those known to be unreadable, with the reason."""
    if isinstance(dataset, FirstOf):
        return FirstOf(undecoded(dataset.dataset, broken), len(dataset))
    if not isinstance(dataset, Images):
        return dataset
    item = dataclasses.replace(dataset.item, transform=NotDecoded())  # type: ignore[type-var]
    return Images(dataset.name, dataset.rows, item, dataset.indices, broken)


def records_of(dataset: Dataset, count: int) -> list[Any]:
    """The first `count` items of a data set or stream."""
    if isinstance(dataset, IterableDataset):
        return list(islice(iter(dataset), count))
    return [dataset[index] for index in range(min(count, len(dataset)))]  # type: ignore[arg-type]


def described(dataset: Dataset) -> str:
    """The size of a data set, for the log."""
    if isinstance(dataset, IterableDataset):
        return "an endless stream"
    return f"{len(dataset):,} training records"  # type: ignore[arg-type]


def _how(config: RunConfig, size: int) -> dict[str, Any]:
    process = PartialState()
    if config.augment == "none":
        transform: Any = EvalTransform(size)
    else:
        transform = TrainTransform(size, flip=config.augment == "crop+flip")
    return {
        "images": config.images,
        "transform": transform,
        "seed": config.seed,
        "rank": process.process_index,
        "world": process.num_processes,
    }


def _at_most(dataset: Any, config: RunConfig) -> Dataset:
    if config.group_by_length and not isinstance(dataset, Images):
        raise ValueError(
            f"--group-by-length: {config.data} is no list, whose texts are known beforehand; leave it out"
        )
    if config.train_size is None:
        return dataset
    if isinstance(dataset, Stream):
        raise ValueError(f"--train-size: {config.data} is a stream of unknown length; leave it out")
    return FirstOf(dataset, config.train_size) if len(dataset) > config.train_size else dataset


def _first(dataset: Dataset, train: Dataset) -> list[Any]:
    found = records_of(dataset, HELD_OUT_IMAGES)
    if not found:
        records_of(train, 1)  # raises the reason if the training images are broken, too
        raise ValueError("the source has no validation images; add more images")
    return found
