"""What a run trains on, and the few held-out pictures it is shown: from the name of a source to data sets.

`scenes` and `easy-vqa` come with the package (or its extra); every other source is opened by `data/sources.py`.
"""

import dataclasses
import random
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset

from xformer_mllm.data.easy_vqa import EasyVqaCaptions, EasyVqaQuestions
from xformer_mllm.data.questions import ByPicture
from xformer_mllm.data.records import Pictures
from xformer_mllm.data.scenes import SceneCaptions, SceneQuestions
from xformer_mllm.data.sources import KNOWN, open_captions, open_questions, stands_for_something
from xformer_mllm.data.streams import Stream
from xformer_mllm.data.transforms import EvalTransform, TrainTransform
from xformer_mllm.model.images import load_image
from xformer_mllm.train.config import RunConfig, Stage2Config

HELD_OUT_PICTURES = 4

Records = list[dict[str, Any]]


class FirstOf(Subset):
    """The first `size` pictures of a data set whose captions and crops are drawn anew in every epoch."""

    def __init__(self, dataset: Any, size: int):
        super().__init__(dataset, range(size))

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class NotDecoded:
    """In place of a transform where a picture's features are at hand: nothing but its file's header is read."""

    size = 0

    def __call__(self, image: Image.Image, decode: Callable, lot: random.Random) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)


def captions(config: RunConfig, picture_size: int) -> tuple[Dataset, Records]:
    """Pictures with captions to train on, and a few held-out ones.

    Args:
        config: names the source.
        picture_size: of the square that the model takes, in pixels.

    Raises FileNotFoundError, ValueError: in one line, as `data/sources.py`.
    """
    if config.data == "scenes":
        return SceneCaptions("train", _scenes(config)), _first(SceneCaptions("validation", HELD_OUT_PICTURES))
    if config.data == "easy-vqa":
        return _at_most(EasyVqaCaptions("train"), config), _first(EasyVqaCaptions("validation"))
    _check_name(config.data)
    cleaned = config.clean_captions
    train = open_captions(config.data, "train", load_image, **_how(config, picture_size), cleaned=cleaned)
    held_out = open_captions(config.data, "validation", load_image, images=config.images, cleaned=cleaned)
    return _at_most(train, config), _first(held_out)


def questions(config: Stage2Config, picture_size: int) -> tuple[Dataset, Records]:
    """Questions with answers to train on, picture by picture, and one on each of a few held-out pictures."""
    each = config.questions_per_picture
    if config.data == "scenes":
        scenes = SceneQuestions("train", _scenes(config), questions_per_scene=each)
        groups = [list(range(first, first + each)) for first in range(0, len(scenes), each)]
        one_each = SceneQuestions("validation", HELD_OUT_PICTURES, questions_per_scene=1)
        return ByPicture(scenes, groups), _first(one_each)
    if config.data == "easy-vqa":
        asked = EasyVqaQuestions("train")
        places: dict[str, list[int]] = {}
        for place, question in enumerate(asked.questions):
            places.setdefault(question.image_id, []).append(place)
        return ByPicture(asked, list(places.values())[: config.train_size]), _first(EasyVqaQuestions("validation"))
    _check_name(config.data)
    train = open_questions(config.data, "train", load_image, **_how(config, picture_size), questions_per_picture=each)
    held_out = open_questions(config.data, "validation", load_image, images=config.images)
    return _at_most(train, config), [picture[0] for picture in _first(held_out)]


def _check_name(data: str) -> None:
    """Raises FileNotFoundError that also names what `data/sources.py` does not know: the sources that come with us."""
    if not stands_for_something(data):
        raise FileNotFoundError(f"{data}: no such source of pictures; it must be scenes, easy-vqa, {KNOWN}")


def undecoded(dataset: Any, broken: dict[str, str]) -> Any:
    """The same pictures, known by name alone. broken: those that will not do, as somebody found who decoded them all."""
    if isinstance(dataset, FirstOf):
        return FirstOf(undecoded(dataset.dataset, broken), len(dataset))
    if not isinstance(dataset, Pictures):
        return dataset
    item = dataclasses.replace(dataset.item, transform=NotDecoded())  # type: ignore[type-var]
    return Pictures(dataset.name, dataset.rows, item, dataset.places, broken)


def records_of(dataset: Dataset, count: int) -> list[Any]:
    """The first `count` items of a data set, or of a stream as it would begin."""
    if isinstance(dataset, IterableDataset):
        return list(islice(iter(dataset), count))
    return [dataset[index] for index in range(min(count, len(dataset)))]  # type: ignore[arg-type]


def described(dataset: Dataset) -> str:
    """How many pictures there are; of a stream nobody knows."""
    return "an endless stream" if isinstance(dataset, IterableDataset) else f"{len(dataset):,} training records"  # type: ignore[arg-type]


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


def _scenes(config: RunConfig) -> int:
    assert config.train_size is not None, "RunConfig says how many scenes there are"
    return config.train_size


def _at_most(dataset: Any, config: RunConfig) -> Dataset:
    if config.train_size is None:
        return dataset
    if isinstance(dataset, Stream):
        raise ValueError(f"--train-size: {config.data} is a stream, of which nobody knows the length; leave it out")
    return FirstOf(dataset, config.train_size) if len(dataset) > config.train_size else dataset


def _first(dataset: Dataset) -> list[Any]:
    found = records_of(dataset, HELD_OUT_PICTURES)
    if not found:
        raise ValueError("the source has no validation pictures to show; add more pictures")
    return found
