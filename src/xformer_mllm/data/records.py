"""Records, the common form of every data source, and the training items made from them.

A record is a plain dictionary, of a usable or of a broken sample:

    {"id": str, "image": ..., "captions": [str, ...], "questions": [{"id", "question", "answers": [str, ...]}, ...]}
    {"id": str, "broken": reason, "lost": number of samples lost}

`image` is a path, the bytes of a file, or a PIL image. Captions or questions may be empty, not both.
"""

import hashlib
import json
import logging
import math
import random
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from PIL import Image
from torch.utils.data import Dataset

from xformer_mllm.data.transforms import Transform
from xformer_mllm.files import printable
from xformer_mllm.model.images import load_image, open_file

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
MAX_BROKEN_SHARE = 0.01  # a few failed downloads are normal; a larger share points to a mistake
MIN_COUNTED = 1000  # assumed least length of a stream, so that a broken first sample is not an error
MAX_NAMED = 5  # broken samples named in a message
VALIDATION_SHARE = 0.01  # of a source without a validation split
CLEAN_WORDS = 50
CAPTIONS = ("caption", "captions", "text", "txt", "sentences", "blip_caption")  # the last is LLaVA's
ANSWERS = ("answers", "answer", "multiple_choice_answer")  # of GQA, VQA and others: the first that a row has

Split = Literal["train", "validation"]
Field = Literal["captions", "questions"]
Record = dict[str, Any]
Item = Callable[[Record, int], Any]
"""Makes a training item from a record and the epoch, counted from 0."""


def record_of(name: str, image: Any, captions: Any = None, questions: Sequence[Mapping] = ()) -> Record:
    """Make a record, broken if it lacks an image or text. captions: as `texts_of` takes them."""
    try:
        texts = texts_of(captions)
    except ValueError as error:
        return broken_record(name, str(error))
    if isinstance(image, str | Path) and not _is_unicode(str(image)):
        return broken_record(name, "the image's path is not valid Unicode")
    kept = [question for question in questions if question["question"] and question["answers"]]
    if image is None or (isinstance(image, str | bytes) and not image):
        return broken_record(name, "no image")
    if texts or kept:
        return {"id": printable(name), "image": image, "captions": texts, "questions": kept}
    if questions:
        return broken_record(name, "an empty question or no answer")
    return broken_record(name, "no caption" if captions is None else "an empty caption")


def broken_record(name: str, why: str, lost: int = 1) -> Record:
    return {"id": printable(name), "broken": why, "lost": lost}


def question_of(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Read a question and its answers from a row with VQA's or GQA's keys. name: its id if the row has none.

    Raises ValueError, as `texts_of`, if one of them is not text.
    """
    answers = next((row[key] for key in ANSWERS if not is_missing(row.get(key))), None)
    question_id = row.get("question_id", row.get("questionId"))
    return {
        "id": name if question_id is None else printable(str(question_id)),
        "question": _text_of(row.get("question"), "a question"),
        "answers": texts_of(answers, "an answer"),
    }


def is_missing(value: Any) -> bool:
    """Return whether a row has no value: 0 and false are values."""
    return value is None or value == "" or value == []


def texts_of(value: Any, what: str = "a caption") -> list[str]:
    """Return the non-empty texts of a text, or of a list of texts, {"raw"} (Karpathy) or {"answer"} (VQA).

    A number becomes its text, and None is no text. Raises ValueError for anything else; `what` is its name there.
    """
    single = isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable)
    values = [value] if single else value
    return [text for each in values if (text := _text_of(each, what))]


def _text_of(value: Any, what: str) -> str:
    if not isinstance(value, str) and isinstance(value, Mapping):  # most are texts, and a Mapping is slow to tell
        value = next((value[key] for key in ("raw", "answer") if key in value), value)
    if value is None:
        return ""
    if isinstance(value, str):
        if not _is_unicode(value):
            raise ValueError(f"{what} is not valid Unicode: {printable(value)[:40]}")
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} is {json.dumps(value, default=str)[:40]}, neither text nor a number")
    return str(value)


def _is_unicode(text: str) -> bool:
    return text.isascii() or printable(text) == text


def clean(caption: str) -> str:
    """Clean a caption as BLIP-2 does (LAVIS, blip_processors.py, `BlipCaptionProcessor.pre_caption`)."""
    words = re.sub(r'[.!"()*#:;~]', " ", caption.lower()).split()
    return " ".join(words[:CLEAN_WORDS])


def open_image(source: str | Path | bytes | Image.Image, name: str) -> Image.Image:
    """Open a record's image without decoding it. Raises ValueError or FileNotFoundError naming it."""
    if isinstance(source, Image.Image):
        return source
    return open_file(source, name) if isinstance(source, bytes) else open_file(Path(source), str(source))


@dataclass(frozen=True)
class _Items:
    """Makes items from records.

    The random choices depend only on the seed, the epoch and the record's id, so a resumed run sees the same items.

    transform: applied to the image; None keeps it a PIL image. field: the texts that a record must have.
    """

    transform: Transform | None
    seed: int
    field: ClassVar[Field]

    def _rng(self, record: Record, epoch: int) -> random.Random:
        return random.Random(f"{self.seed}/{epoch}/{record['id']}")

    def _image(self, record: Record, rng: random.Random) -> Image.Image | torch.Tensor:
        image = open_image(record["image"], record["id"])
        with nullcontext() if image is record["image"] else image:  # closing a given PIL image would drop its pixels
            return load_image(image) if self.transform is None else self.transform(image, rng)


@dataclass(frozen=True)
class CaptionItems(_Items):
    """Items {"id", "image", "caption"}, with one of the record's captions, resampled each epoch.

    cleaned: apply `clean` to the caption.
    """

    cleaned: bool = False
    field: ClassVar[Field] = "captions"

    def __call__(self, record: Record, epoch: int) -> dict[str, Any]:
        rng = self._rng(record, epoch)
        text = self._caption(record, rng)
        return {"id": record["id"], "image": self._image(record, rng), "caption": text}

    def text_length(self, record: Record, epoch: int) -> int:
        """Characters of the item's caption, without opening the image."""
        return len(self._caption(record, self._rng(record, epoch)))

    def _caption(self, record: Record, rng: random.Random) -> str:
        if not record["captions"]:
            raise ValueError(f"{record['id']}: no caption")
        caption = rng.choice(record["captions"])
        text = clean(caption) if self.cleaned else caption
        if not text:
            raise ValueError(f"{record['id']}: the caption {caption!r} is empty after cleaning")
        return text


@dataclass(frozen=True)
class QuestionItems(_Items):
    """Items [{"id", "image_id", "image", "question", "answer"}, ...], the questions about one image.

    The answer is drawn from those of all annotators each epoch, so frequent answers are trained on more often.

    at_most: maximum questions per image, resampled each epoch; None for all.
    """

    at_most: int | None = None
    field: ClassVar[Field] = "questions"

    def __call__(self, record: Record, epoch: int) -> list[dict[str, Any]]:
        rng = self._rng(record, epoch)
        questions = self._questions(record, rng)
        shared = {"image_id": record["id"], "image": self._image(record, rng)}
        return [{**shared, **question, "answer": rng.choice(question["answers"])} for question in questions]

    def text_length(self, record: Record, epoch: int) -> int:
        """Characters of the item's longest question, without opening the image."""
        return max(len(question["question"]) for question in self._questions(record, self._rng(record, epoch)))

    def _questions(self, record: Record, rng: random.Random) -> list[dict[str, Any]]:
        questions = record["questions"]
        if not questions:
            raise ValueError(f"{record['id']}: no question")
        if self.at_most is not None and len(questions) > self.at_most:
            return rng.sample(questions, self.at_most)
        return questions


def split_indices(ids: Iterable[str], split: Split, validation_share: float) -> array:
    """Select a split's records by a hash of the id, so that adding records moves no others between the splits.

    Validation has at least one record, the one with the lowest hash.
    """
    hashes = array("d", map(hash_of, ids))
    validation = {index for index, value in enumerate(hashes) if value < validation_share}
    validation = validation or {min(range(len(hashes)), key=hashes.__getitem__)}
    return array("q", (index for index in range(len(hashes)) if (index in validation) == (split == "validation")))


def hash_of(name: str) -> float:
    """Hash a name to a number uniform in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


class Rows(Protocol):
    """Records with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def ids(self) -> Iterable[str]: ...

    @property
    def counts(self) -> Mapping[Field, Sequence[int]]: ...  # the number of captions and questions of each record


class Images(Dataset):
    """A map-style data set.

    An unreadable image is replaced by the next readable one, so that a resumed run sees the same items. Raises
    ValueError once more than 1 % of the images are broken; each worker process counts those it has read.

    Args:
        name: of the source, for messages.
        rows: the records.
        item: makes an item from a record.
        indices: of the records in this data set; None for all.
        broken: ids of records known to be broken, with the reason.
    """

    def __init__(
        self,
        name: str,
        rows: Rows,
        item: Item,
        indices: Sequence[int] | None = None,
        broken: Mapping[str, str] | None = None,
    ):
        self.name, self.rows, self.item = name, rows, item
        self.indices: Sequence[int] = range(len(rows)) if indices is None else indices
        self.broken: dict[str, str] = dict(broken or {})
        self._total = len(self.indices) + len(self.broken)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, for which captions and crops are resampled. Call it before iterating."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.indices)

    def text_lengths(self) -> list[int]:
        """Characters of each item's longest text in this epoch; 0 for a broken record."""
        lengths = []
        for index in self.indices:
            try:
                lengths.append(self.item.text_length(self.rows[int(index)], int(self._epoch)))  # type: ignore[attr-defined]
            except ValueError:
                lengths.append(0)
        return lengths

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        for offset in range(len(self)):
            record = self.rows[int(self.indices[(index + offset) % len(self)])]
            if record["id"] in self.broken:
                continue
            try:
                return make_item(self.item, record, int(self._epoch))
            except (ValueError, OSError) as error:
                self.broken[record["id"]] = str(error)
                logger.warning("skipped a broken image: %s", error)
                check_broken(self.name, len(self.broken), self._total, self.broken)
        raise AssertionError("unreachable: check_broken raises before every image is broken")


def make_item(item: Item, record: Record, epoch: int) -> Any:
    """Make an item. Raises ValueError or OSError if the record is broken or its image unreadable."""
    if "broken" in record:
        raise ValueError(f"{record['id']}: {record['broken']}")
    return item(record, epoch)


def check_broken(source: str, found: int, total: int, broken: Mapping[str, str], what: str = "images") -> None:
    """Raise ValueError if more than 1 % is broken. broken: reasons by name, of the first ones at least."""
    if found > MAX_BROKEN_SHARE * total:
        raise ValueError(
            f"{source}: {found:,} of {total:,} {what} cannot be read, more than {MAX_BROKEN_SHARE:.0%}: "
            f"{_by_cause(broken)}; repair or remove them"
        )


def _by_cause(broken: Mapping[str, str]) -> str:
    """Join the first broken samples, those with the same reason together: "a, b: no caption; c: no image"."""
    causes: dict[str, list[str]] = {}
    for name, why in islice(broken.items(), MAX_NAMED):
        where, _, rest = why.partition(": ")
        is_named = Path(where).name.startswith(Path(name).name)  # a file's path, or the name itself
        causes.setdefault(rest if rest and is_named else why, []).append(name)
    first = "; ".join(f"{', '.join(names)}: {why}" for why, names in causes.items())
    return first + ("; ..." if len(broken) > MAX_NAMED else "")


def shorten(names: Collection[str]) -> str:
    """Join the first names with commas."""
    return ", ".join(list(names)[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
