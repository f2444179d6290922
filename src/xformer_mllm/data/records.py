"""What every source of images gives: records. And how a record becomes an item of a training set.

A record is a plain dictionary:

    {"id": str, "image": ..., "captions": [str, ...], "questions": [{"id", "question", "answers": [str, ...]}, ...]}
    {"id": str, "broken": why, "lost": samples}    what stood there cannot be used

`image` is a path, the bytes of a file, or a PIL image. Captions or questions may be missing, not both.
"""

import hashlib
import io
import logging
import random
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from xformer_mllm.data.transforms import Transform
from xformer_mllm.model.images import load_image

logger = logging.getLogger(__name__)

MAX_BROKEN_SHARE = 0.01  # a download loses an image here and there; more than this is a mistake somewhere
GRACE = 1000  # samples: where their number is not known, ten may be broken before so many have been seen
NAMED = 5  # broken ones that are named
VALIDATION_SHARE = 0.01  # of a source that names no validation split

Split = Literal["train", "validation"]
Record = dict[str, Any]
Item = Callable[[Record, int], Any]
"""A record and the number of the visit (the pass over the data, from 0) -> an item of a training set."""


# ------------------------------------------------------------------------------------------------------- into records


def record_of(name: str, image: Any, captions: Any = None, questions: Sequence[Mapping] = ()) -> Record:
    """A record, or a broken one that says what it lacks. captions: a text or several, also as {"raw": text}."""
    texts = texts_of(captions)
    kept = [question for question in questions if question["question"] and question["answers"]]
    if image is None or (isinstance(image, str | bytes) and not image):
        return broken(name, "no image")
    if texts or kept:
        return {"id": name, "image": image, "captions": texts, "questions": kept}
    if questions:
        return broken(name, "a question without words or without an answer")
    return broken(name, "no caption" if captions is None else "an empty caption")


def broken(name: str, why: str, lost: int = 1) -> Record:
    return {"id": name, "broken": why, "lost": lost}


def question_of(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A question and its answers, from a row with "question" and "answers", "answer" or VQA's own words for them."""
    answers = next((row[key] for key in ("answers", "answer", "multiple_choice_answer") if row.get(key)), None)
    number = row.get("question_id", row.get("questionId"))
    words = row.get("question")
    return {
        "id": name if number is None else str(number),
        "question": words.strip() if isinstance(words, str) else "",
        "answers": texts_of(answers),
    }


def texts_of(value: Any) -> list[str]:
    """The texts that are not empty of a text, or of a list of texts or of {"raw"} (Karpathy) or {"answer"} (VQA)."""
    values = value if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else [value]
    texts = (text.get("raw", text.get("answer")) if isinstance(text, Mapping) else text for text in values)
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


CLEAN_WORDS = 50


def clean(caption: str) -> str:
    """A caption as BLIP-2 trains on it (LAVIS, blip_processors.py, `BlipCaptionProcessor.pre_caption`)."""
    words = re.sub(r'[.!"()*#:;~]', " ", caption.lower()).split()
    return " ".join(words[:CLEAN_WORDS])


# ------------------------------------------------------------------------------------------------------ out of records


def open_image(source: str | Path | bytes | Image.Image, name: str) -> Image.Image:
    """Open a record's image without decoding it. Raises ValueError or OSError, in one line that names it."""
    if isinstance(source, Image.Image):
        return source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `load_image` has its own, lower limit
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError:
        raise FileNotFoundError(f"{source!s}: no such image") from None
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, ... on foreign bytes
        place = name if isinstance(source, bytes) else source
        reason = "no image format that Pillow knows" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise ValueError(f"{place}: not an image that can be read ({reason})") from error
    if isinstance(source, bytes):
        image.filename = name  # for `load_image` to name  # type: ignore[attr-defined]
    return image


@dataclass(frozen=True)
class _Items:
    """transform: what is made of the image; without one it stays a PIL image. seed: of what is random.

    Everything random is drawn from the seed, the visit and the record's id: a resumed run sees the same caption and crop.
    """

    transform: Transform | None
    seed: int

    def _lot(self, record: Record, visit: int) -> random.Random:
        return random.Random(f"{self.seed}/{visit}/{record['id']}")

    def _image(self, record: Record, rng: random.Random) -> Image.Image | torch.Tensor:
        image = open_image(record["image"], record["id"])
        with nullcontext() if image is record["image"] else image:  # closes its file; `close` would drop its pixels
            return load_image(image) if self.transform is None else self.transform(image, rng)


@dataclass(frozen=True)
class CaptionItems(_Items):
    """-> {"id", "image", "caption"}: one of the record's captions, drawn anew at every visit, and cleaned if so wished."""

    cleaned: bool = False

    def __call__(self, record: Record, visit: int) -> dict[str, Any]:
        if not record["captions"]:
            raise ValueError(f"{record['id']}: no caption")
        rng = self._lot(record, visit)
        caption = rng.choice(record["captions"])
        text = clean(caption) if self.cleaned else caption
        if not text:
            raise ValueError(f"{record['id']}: no word is left of the caption {caption!r}")
        return {"id": record["id"], "image": self._image(record, rng), "caption": text}


@dataclass(frozen=True)
class QuestionItems(_Items):
    """-> [{"id", "image_id", "image", "question", "answer"}, ...]: the image's questions.

    at_most: so many questions of an image, drawn anew at every visit. The answer is one of the annotators', drawn anew,
    too: an answer that more of them gave is learned more often.
    """

    at_most: int | None = None

    def __call__(self, record: Record, visit: int) -> list[dict[str, Any]]:
        if not record["questions"]:
            raise ValueError(f"{record['id']}: no question")
        rng = self._lot(record, visit)
        asked = record["questions"]
        if self.at_most is not None and len(asked) > self.at_most:
            asked = rng.sample(asked, self.at_most)
        shared = {"image_id": record["id"], "image": self._image(record, rng)}
        return [{**shared, **question, "answer": rng.choice(question["answers"])} for question in asked]


# -------------------------------------------------------------------------------------------------------------- splits


def places_of(ids: Sequence[str], split: Split, validation_share: float) -> list[int]:
    """The places of a split's records, by the hash of the id: a record keeps its split when others come or go.

    Of the fewest records, too, there is one for validation: the one with the lowest hash.
    """
    hashes = [hash_of(name) for name in ids]
    validation = {place for place, value in enumerate(hashes) if value < validation_share}
    validation = validation or {min(range(len(ids)), key=hashes.__getitem__)}
    return [place for place in range(len(ids)) if (place in validation) == (split == "validation")]


def hash_of(name: str) -> float:
    """Uniform in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


# ------------------------------------------------------------------------------------------------------ records in rows


class Rows(Protocol):
    """Records that can be had in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int) -> Record: ...

    def ids(self) -> Sequence[str]: ...

    def counts(self, field: str) -> Sequence[int]:
        """How many captions or questions each record has."""
        ...


class Table:
    """Rows in an Arrow table: worker processes share its memory, and the captions of millions of images fit."""

    def __init__(self, records: Iterable[Record]):
        from datasets import Dataset as ArrowDataset  # the extra `train`

        columns: dict[str, list] = {"id": [], "image": [], "captions": [], "questions": []}
        for record in records:
            for name, column in columns.items():
                column.append(record[name])
        columns["image"] = [str(image) for image in columns["image"]]
        self._counts = {field: [len(texts) for texts in columns[field]] for field in ("captions", "questions")}
        self._table = ArrowDataset.from_dict(columns)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, place: int) -> Record:
        return self._table[place]

    def ids(self) -> Sequence[str]:
        return self._table["id"][:]

    def counts(self, field: str) -> Sequence[int]:
        return self._counts[field]


class Images(Dataset):
    """Items of a source whose images can be had in any order.

    An image that cannot be read when it is asked for is replaced by the next one in order that can, so that a run
    and its resumption see the same items; `broken` holds what was wrong with each, by id. Once more than 1 % of the
    images are broken, ValueError. (Every worker process of a loader counts the broken images that it met itself.)

    Args:
        name: the source's, for messages.
        rows: the records.
        item: makes an item of a record.
        places: of the records that belong to the data set; all of them if None.
        broken: what was already found to be broken.
    """

    def __init__(
        self,
        name: str,
        rows: Rows,
        item: Item,
        places: Sequence[int] | None = None,
        broken: Mapping[str, str] | None = None,
    ):
        self.name, self.rows, self.item = name, rows, item
        self.places: Sequence[int] = range(len(rows)) if places is None else places
        self.broken: dict[str, str] = dict(broken or {})
        self._total = len(self.places) + len(self.broken)
        self._visit = torch.zeros((), dtype=torch.int64).share_memory_()  # worker processes that stay see it change

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the data comes now: captions and crops are drawn anew for each. To be called before it."""
        self._visit.fill_(epoch)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        for offset in range(len(self)):
            record = self.rows[int(self.places[(index + offset) % len(self)])]
            if record["id"] in self.broken:
                continue
            try:
                if "broken" in record:
                    raise ValueError(f"{record['id']}: {record['broken']}")
                return self.item(record, int(self._visit))
            except (ValueError, OSError) as error:
                self._note_broken(record["id"], str(error))
        raise AssertionError("unreachable: _note_broken stops long before every image is broken")

    def _note_broken(self, name: str, why: str) -> None:
        self.broken[name] = why
        logger.warning("left out a broken image: %s", why)
        check_broken(self.name, len(self.broken), self._total, self.broken)


def check_broken(source: str, found: int, total: int, names: Collection[str], what: str = "images") -> None:
    """Raise ValueError if more than 1 % is broken."""
    if found > MAX_BROKEN_SHARE * total:
        raise ValueError(
            f"{source}: {found:,} of {total:,} {what} cannot be read, more than {MAX_BROKEN_SHARE:.0%}: "
            f"{first_names(names)}; remove or replace them"
        )


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def first_names(names: Collection[str]) -> str:
    return ", ".join(list(names)[:NAMED]) + (", ..." if len(names) > NAMED else "")


def sound(records: Iterable[Record], found: dict[str, str]) -> Iterator[Record]:
    """The records that are not broken; the others' ids and faults go into `found`."""
    for record in records:
        if "broken" in record:
            found[record["id"]] = record["broken"]
        else:
            yield record
