"""Hugging Face data sets: by name (`hf:NAME` or `hf:NAME:CONFIGURATION`, streamed), or a folder that `save_to_disk` wrote.

The image is the first column of type Image; captions are in a column of one of the names in `CAPTIONS` (a text or a
list), questions in `question` with `answers` or `answer`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xformer_mllm.data.formats import Listed
from xformer_mllm.data.records import Record, broken, check_broken, one_line, question_of, record_of, texts_of
from xformer_mllm.data.shards import Wanted, everything

PREFIX = "hf:"
IMAGES = ("image", "jpg", "png", "webp", "jpeg")
CAPTIONS = ("caption", "captions", "text", "txt", "sentences")
IDS = ("id", "image_id", "__key__")
ANSWERS = ("answers", "answer", "multiple_choice_answer")
SPLITS = {"val": "validation", "dev": "validation"}  # ours, where the name is another
READ_AT_ONCE = 16


@dataclass(frozen=True)
class Columns:
    """Which column holds what; None where there is none."""

    image: str
    caption: str | None
    asks: bool
    id: str | None

    def record(self, row: Mapping[str, Any], place: str) -> Record:
        name = str(row[self.id]) if self.id else place
        image = row[self.image]
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        questions = [question_of(f"{name}/0", row)] if self.asks else []
        return record_of(name, image, row[self.caption] if self.caption else None, questions)


def _columns(name: str, features: Mapping[str, Any]) -> Columns:
    """Raises ValueError if the columns that are needed are not there."""
    from datasets import Image

    images = [column for column, kind in features.items() if isinstance(kind, Image)]
    images += [column for column in IMAGES if column in features]
    caption = next((column for column in CAPTIONS if column in features), None)
    asks = "question" in features and any(column in features for column in ANSWERS)
    if not images or not (caption or asks):
        raise ValueError(
            f"{name}: needs a column of images, and one of {', '.join(CAPTIONS)} or question with answers; "
            f"its columns are {', '.join(features)}"
        )
    return Columns(images[0], caption, asks, next((column for column in IDS if column in features), None))


def _undecoded(dataset: Any, columns: Columns) -> Any:
    """The data set with its images left as the bytes of their files."""
    from datasets import Image

    is_image = isinstance((dataset.features or {}).get(columns.image), Image)
    return dataset.cast_column(columns.image, Image(decode=False)) if is_image else dataset


# ------------------------------------------------------------------------------------------------------ saved to disk


def is_saved(folder: Path) -> bool:
    """Whether a folder is what `save_to_disk` writes."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_saved(folder: Path, any_share: bool = False) -> Listed:
    """A data set that `save_to_disk` wrote.

    Raises ValueError if it has not the columns that are needed or, without any_share, if more than 1 % of it is broken.
    """
    from datasets import DatasetDict, load_from_disk

    loaded = load_from_disk(str(folder))
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"": loaded}
    rows = {SPLITS.get(split, split): SavedRows(str(folder), dataset) for split, dataset in splits.items()}
    without = {
        f"{split or 'row'} {place}": "no caption and no question"
        for split, of_split in rows.items()
        for place, (captions, questions) in enumerate(
            zip(of_split.counts("captions"), of_split.counts("questions"), strict=True)
        )
        if not captions and not questions
    }
    if not any_share:
        total = sum(map(len, rows.values()))
        check_broken(str(folder), len(without), total, [f"{name} ({why})" for name, why in without.items()], "rows")
    return Listed(str(folder), "a Hugging Face data set on disk", rows, without)


class SavedRows:
    """Rows of a data set on disk. One that lacks its image or text is found when it is asked for: ValueError."""

    def __init__(self, name: str, dataset: Any):
        self.columns = _columns(name, dataset.features)
        self._dataset = _undecoded(dataset, self.columns)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: int) -> Record:
        return self.columns.record(self._dataset[place], str(place))

    def ids(self) -> Sequence[str]:
        if self.columns.id is None:
            return [str(place) for place in range(len(self))]
        return [str(value) for value in self._dataset[self.columns.id][:]]

    def counts(self, field: str) -> Sequence[int]:
        if field == "questions":
            return [int(self.columns.asks)] * len(self)
        if self.columns.caption is None:
            return [0] * len(self)
        return [len(texts_of(value)) for value in self._dataset[self.columns.caption][:]]


# ------------------------------------------------------------------------------------------------------------ streamed


@dataclass(frozen=True)
class HubShards:
    """A data set that is streamed: from the Hugging Face Hub, or from a folder that `load_dataset` understands."""

    name: str
    shards: Mapping[str, Sequence[str]]
    datasets: Mapping[str, Any]
    columns: Columns
    format: str = "a Hugging Face data set, streamed"

    def read(self, shard: str, wanted: Wanted = everything) -> Iterator[Record]:
        split, _, index = shard.rpartition("/")
        dataset = self.datasets[split]
        part = dataset.shard(num_shards=dataset.num_shards, index=int(index))
        place = -1
        try:
            # `iter` and not the data set's own iterator, which would split the shard between a loader's worker processes.
            for batch in part.iter(batch_size=READ_AT_ONCE):
                for values in zip(*batch.values(), strict=True):
                    place += 1
                    record = self.columns.record(dict(zip(batch, values, strict=True)), f"{shard}/{place}")
                    if wanted(place, record["id"]):
                        yield record
        except (OSError, ValueError) as error:  # of the network or of a file's format (pyarrow's are ValueErrors)
            lost = max(1, (self.size(split) or 0) // dataset.num_shards - place - 1)
            yield broken(f"{self.name} {shard}", f"cannot be read further ({one_line(error)})", lost)

    def size(self, split: str) -> int | None:
        about = (self.datasets[split].info.splits or {}).get(split)
        return about.num_examples if about and about.num_examples else None


def find_on_hub(source: str) -> HubShards:
    """`hf:NAME` or `hf:NAME:CONFIGURATION`. Raises ValueError, in one line, if it cannot be had."""
    from datasets import load_dataset

    name, _, configuration = source.removeprefix(PREFIX).partition(":")
    try:
        found = load_dataset(name, configuration or None, streaming=True)
    except (
        Exception
    ) as error:  # no such name, no network, no rights, a foreign format: every one has its own exception
        raise ValueError(f"{source}: cannot be opened ({one_line(error)})") from error
    first = next(iter(found.values()))
    columns = _columns(source, first.features or next(iter(first.take(1))))
    splits = {SPLITS.get(split, split): _undecoded(dataset, columns) for split, dataset in found.items()}
    shards = {split: [f"{split}/{index}" for index in range(dataset.num_shards)] for split, dataset in splits.items()}
    return HubShards(source, shards, splits, columns)
