"""Hugging Face data sets: `hf:NAME` or `hf:NAME:CONFIGURATION`, streamed, or a folder written by `save_to_disk`.

The columns used: the first of type Image; the first of `CAPTIONS` (a string or a list); `question`, with one of `ANSWERS`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xformer_mllm.data.formats import ListSource
from xformer_mllm.data.records import (
    ANSWERS,
    CAPTIONS,
    Field,
    Record,
    broken_record,
    one_line,
    question_of,
    record_of,
    texts_of,
)
from xformer_mllm.data.shards import ShardSource, Wanted

PREFIX = "hf:"
IMAGES = ("image", "jpg", "png", "webp", "jpeg")
IDS = ("id", "image_id", "__key__")
SPLITS = {"val": "validation", "dev": "validation"}
READ_AT_ONCE = 16


@dataclass(frozen=True)
class Columns:
    """The names of the columns used; None if absent."""

    image: str
    caption: str | None
    has_questions: bool
    id: str | None

    def record(self, row: Mapping[str, Any], index: str) -> Record:
        name = str(row[self.id]) if self.id else index
        image = row[self.image]
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        try:
            questions = [question_of(f"{name}/0", row)] if self.has_questions else []
        except ValueError as error:
            return broken_record(name, str(error))
        return record_of(name, image, row[self.caption] if self.caption else None, questions)


def _columns(name: str, features: Mapping[str, Any]) -> Columns:
    """Choose the columns. Raises ValueError if a required one is missing."""
    from datasets import Image

    images = [column for column, kind in features.items() if isinstance(kind, Image)]
    images += [column for column in IMAGES if column in features]
    caption, identity = (next((column for column in names if column in features), None) for names in (CAPTIONS, IDS))
    has_questions = "question" in features and any(column in features for column in ANSWERS)
    if not images or not (caption or has_questions):
        raise ValueError(
            f"{name}: needs a column of images and one of {', '.join(CAPTIONS)} or question with answers; "
            f"its columns are {', '.join(features)}"
        )
    return Columns(images[0], caption, has_questions, identity)


def _undecoded(dataset: Any, columns: Columns) -> Any:
    """Return the data set with images as the bytes of their files."""
    from datasets import Image

    is_image = isinstance((dataset.features or {}).get(columns.image), Image)
    return dataset.cast_column(columns.image, Image(decode=False)) if is_image else dataset


def is_saved(folder: Path) -> bool:
    """Return whether the folder was written by `save_to_disk`."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_saved(folder: Path) -> ListSource:
    """Read a data set written by `save_to_disk`. Raises ValueError if a required column is missing."""
    from datasets import DatasetDict, load_from_disk

    loaded = load_from_disk(str(folder))
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"": loaded}
    rows = {SPLITS.get(split, split): SavedRows(str(folder), dataset) for split, dataset in splits.items()}
    without = {
        f"{split or 'row'} {index}": of_split[index]["broken"]
        for split, of_split in rows.items()
        for index, counts in enumerate(zip(*of_split.counts.values(), strict=True))
        if not any(counts)
    }
    return ListSource(str(folder), "a Hugging Face data set on disk", rows, without)


class SavedRows:
    """Rows of a data set on disk. Records without an image or text are found on access."""

    def __init__(self, name: str, dataset: Any):
        self.columns = _columns(name, dataset.features)
        self._dataset = _undecoded(dataset, self.columns)
        captions = self._dataset[self.columns.caption][:] if self.columns.caption else [None] * len(dataset)
        self.counts: dict[Field, list[int]] = {
            "captions": [_count(value) for value in captions],
            "questions": [int(self.columns.has_questions)] * len(dataset),
        }

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Record:
        return self.columns.record(self._dataset[index], str(index))

    def ids(self) -> Sequence[str]:
        if self.columns.id is None:
            return [str(index) for index in range(len(self))]
        return [str(value) for value in self._dataset[self.columns.id][:]]


def _count(captions: Any) -> int:
    """Count the captions of a row: none of a broken one."""
    try:
        return len(texts_of(captions))
    except ValueError:
        return 0


@dataclass(frozen=True)
class HubShards(ShardSource):
    """A streamed data set, from the Hub or a folder that `load_dataset` reads."""

    datasets: Mapping[str, Any]
    columns: Columns
    format = "a Hugging Face data set, streamed"

    def read(self, shard: str, wanted: Wanted | None = None) -> Iterator[Record]:
        split, _, number = shard.rpartition("/")
        dataset = self.datasets[split]
        part = dataset.shard(num_shards=dataset.num_shards, index=int(number))
        index = -1
        try:
            # The data set's own iterator would split the shard between worker processes.
            for batch in part.iter(batch_size=READ_AT_ONCE):
                for values in zip(*batch.values(), strict=True):
                    index += 1
                    record = self.columns.record(dict(zip(batch, values, strict=True)), f"{shard}/{index}")
                    if wanted is None or wanted(index, record["id"]):
                        yield record
        except (OSError, ValueError) as error:  # network or file format (pyarrow's errors are ValueErrors)
            lost = max(1, (self.size(split) or 0) // dataset.num_shards - index - 1)
            yield broken_record(f"{self.name} {shard}", f"reading stopped ({one_line(error)})", lost)

    def size(self, split: str) -> int | None:
        about = (self.datasets[split].info.splits or {}).get(split)
        return about.num_examples if about and about.num_examples else None


def find_on_hub(source: str) -> HubShards:
    """Open `hf:NAME` or `hf:NAME:CONFIGURATION`. Raises ValueError if this fails."""
    from datasets import load_dataset

    name, _, configuration = source.removeprefix(PREFIX).partition(":")
    try:
        found = load_dataset(name, configuration or None, streaming=True)
    except Exception as error:  # a wrong name, no network, no access, an unknown format: each has its own class
        raise ValueError(f"{source}: cannot be opened ({one_line(error)})") from error
    first = next(iter(found.values()))
    columns = _columns(source, first.features or next(iter(first.take(1))))
    splits = {SPLITS.get(split, split): _undecoded(dataset, columns) for split, dataset in found.items()}
    shards = {split: [f"{split}/{index}" for index in range(dataset.num_shards)] for split, dataset in splits.items()}
    return HubShards(source, shards, splits, columns)
