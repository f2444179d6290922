"""A source of images, by what the user calls it -> a data set to train on.

    DIR                         a folder of images with a .txt beside each
    FILE.json                   a list of {"image", "caption"} (BLIP); COCO captions; Karpathy; Visual Genome's regions
    FILE.jsonl                  {"image", "caption"} or {"image", "question", "answers"} a line
    DIR, FILE.tar, PATTERN      webdataset shards: a folder of .tar, one, or cc12m/{00000..01242}.tar
    DIR                         a Hugging Face data set that `save_to_disk` wrote
    hf:NAME                     a Hugging Face data set, streamed
    FILE.json                   a mixture: {"sources": [{"source", "weight", "images"}, ...]}

Lists are data sets with a length; shards, streamed data sets and mixtures are endless streams (`streams.Stream`).
"""

import logging
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from xformer_mllm.data.formats import Listed, read_folder, read_json_lines_source, read_json_source
from xformer_mllm.data.huggingface import PREFIX, find_on_hub, is_saved, read_saved
from xformer_mllm.data.records import (
    CaptionItems,
    Images,
    Item,
    QuestionItems,
    Split,
    first_names,
    places_of,
)
from xformer_mllm.data.shards import Sharded, find_shards
from xformer_mllm.data.streams import (
    BUFFER,
    HeldOut,
    InSplit,
    ListPart,
    Part,
    ShardPart,
    Stream,
    any_name,
)
from xformer_mllm.data.transforms import Transform
from xformer_mllm.files import read_json

logger = logging.getLogger(__name__)

Field = Literal["captions", "questions"]

KNOWN = "a folder, FILE.json, FILE.jsonl, FILE.tar, a pattern of .tar files, or hf:NAME"


@dataclass(frozen=True)
class Mixture:
    """Several sources, and how often each is drawn from: in proportion to its weight, by default to its captions."""

    name: str
    sources: tuple["Listed | Sharded", ...]
    weights: tuple[float | None, ...]


def open_captions(
    source: str,
    split: Split,
    *,
    images: Path | None = None,
    transform: Transform | None = None,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    buffer: int = BUFFER,
    cleaned: bool = False,
) -> Dataset:
    """Images with captions: items {"id", "image", "caption"}; one of an image's captions, drawn at every visit.

    Args:
        source: see above.
        split: the source's own if it names one; else the images whose id's hash falls into it: 1 % for validation, of a
            folder 10 %. A test split is never used.
        images: the folder of the images that a list names, or of the sources that a mixture names, if they are not
            beside the file.
        transform: "image" is then its uint8[3, S, S]; without one it is a PIL image.
        seed: of captions, crops and, for streams, the order.
        rank, world: which of how many training processes this is; for streams, which split themselves.
        buffer: size of each shuffle buffer; for shards.
        cleaned: captions as `records.clean` leaves them.

    Returns:
        Training: `records.Images`, which has a length and takes `set_epoch`, or an endless `streams.Stream`.
        Validation: `records.Images`, or a finite `streams.HeldOut`, always in the same order.

    Raises FileNotFoundError, ValueError: in one line, if the source is not there, is of no known format, has no captions,
    or more than 1 % of it is broken.
    """
    return _open(source, split, CaptionItems(transform, seed, cleaned), "captions", images, seed, rank, world, buffer)


def open_questions(
    source: str,
    split: Split,
    *,
    images: Path | None = None,
    transform: Transform | None = None,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    buffer: int = BUFFER,
    questions_per_image: int | None = None,
) -> Dataset:
    """Images with questions: an item is a list of {"id", "image_id", "image", "question", "answer"} on one image.

    questions_per_image: at most so many, drawn anew at every visit; None for all. The rest is as in `open_captions`.
    """
    item = QuestionItems(transform, seed, questions_per_image)
    return _open(source, split, item, "questions", images, seed, rank, world, buffer)


def stands_for_something(source: str) -> bool:
    """Whether there is such a file or folder, or the name is one of shards or of the hub."""
    return source.startswith(PREFIX) or _names_shards(source) or Path(source).exists()


def _names_shards(source: str) -> bool:
    return Path(source).suffix == ".tar" or "*" in source or "{" in source


def find_source(source: str, images: Path | None = None, any_share: bool = False) -> Listed | Sharded | Mixture:
    """What `source` names. Raises as `open_captions`; with any_share, however much of it is broken."""
    if source.startswith(PREFIX):
        return find_on_hub(source)
    path = Path(source)
    if _names_shards(source):
        return find_shards(source)
    if not path.exists():
        raise FileNotFoundError(f"{source}: no such source of images; it must be {KNOWN}")
    if path.suffix == ".jsonl":
        return read_json_lines_source(path, images, any_share)
    if path.suffix == ".json":
        content = read_json(path)
        is_mixture = isinstance(content, dict) and "sources" in content
        return (
            _read_mixture(path, content, images or path.parent, any_share)
            if is_mixture
            else read_json_source(path, content, images, any_share)
        )
    if not path.is_dir():
        raise ValueError(f"{source}: of no known format; it must be {KNOWN}")
    if is_saved(path):
        return read_saved(path, any_share)
    return find_shards(source) if any(path.glob("*.tar")) else read_folder(path)


def _read_mixture(file: Path, content: Mapping[str, Any], base: Path, any_share: bool) -> Mixture:
    """base: the folder in which relative paths begin."""
    entries = content["sources"]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'{file}: "sources" must be a list of {{"source", "weight", "images"}}')
    found, weights = [], []
    for place, entry in enumerate(entries):
        where = f"{file}: sources[{place}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
            raise ValueError(f'{where}: needs a "source"')
        if unknown := entry.keys() - {"source", "weight", "images", "comment"}:
            raise ValueError(f"{where}: unknown {sorted(unknown)[0]!r}; known: source, weight, images, comment")
        weight = entry.get("weight")
        if weight is not None and not (isinstance(weight, int | float) and weight > 0):
            raise ValueError(f"{where}: the weight must be a positive number, not {weight!r}")
        name = entry["source"]
        images = base / entry["images"] if "images" in entry else None
        one = find_source(name if name.startswith(PREFIX) else str(base / name), images, any_share)
        if isinstance(one, Mixture):
            raise ValueError(f"{where}: is a mixture itself; name its sources here")
        found.append(one)
        weights.append(weight)
    return Mixture(str(file), tuple(found), tuple(weights))


# ----------------------------------------------------------------------------------------------------------- data sets


def _open(
    source: str,
    split: Split,
    item: Item,
    field: Field,
    images: Path | None,
    seed: int,
    rank: int,
    world: int,
    buffer: int,
) -> Dataset:
    found = find_source(source, images)
    if isinstance(found, Listed):
        part = list_part(found, split, field)
        if split == "train":  # said once, by the training split
            _say_left_out(found)
        return Images(found.name, part.rows, item, part.places, found.broken if split == "train" else None)
    parts = _parts(found, split, field)
    return Stream(source, parts, item, seed, rank, world, buffer) if split == "train" else HeldOut(parts, item)


def _say_left_out(found: Listed) -> None:
    counts = {**found.left_out, "broken": len(found.broken)}
    parts = [f"{count:,} {reason}" for reason, count in counts.items() if count]
    if parts:
        named = f": {first_names([f'{name} ({why})' for name, why in found.broken.items()])}" if found.broken else ""
        logger.warning("%s: left out %s%s", found.name, ", ".join(parts), named)


def _parts(found: Mixture | Sharded, split: Split, field: Field) -> list[Part]:
    if not isinstance(found, Mixture):
        return [shard_part(found, split)]
    parts: list[Part] = []
    for one, weight in zip(found.sources, found.weights, strict=True):
        if isinstance(one, Listed):
            parts.append(list_part(one, split, field, weight))
        else:
            parts.append(shard_part(one, split, weight or _size(one, found.name)))
    return parts


def _size(source: Sharded, mixture: str) -> int:
    size = source.size(_name_of(source.name, source.shards, "train"))
    if not size:
        raise ValueError(
            f'{mixture}: give {source.name} a "weight": how many samples it has is not known '
            "(shards say so in NAME_stats.json)"
        )
    return size


def list_part(source: Listed, split: Split, field: Field, weight: float | None = None) -> ListPart:
    """The rows of a split that have captions, or questions. weight: by default how many captions or questions.

    Raises ValueError if there are none.
    """
    rows = source.rows[_name_of(source.name, source.rows, split)]
    counts = rows.counts(field)
    places: Sequence[int] = [place for place, count in enumerate(counts) if count]
    if not places:
        other: Field = "captions" if field == "questions" else "questions"
        hint = f"; it has {other} (--text {other})" if any(rows.counts(other)) else ""
        raise ValueError(f"{source.name}: no {field}{hint}")
    if "validation" not in source.rows:
        ids = rows.ids()
        chosen = places_of([ids[place] for place in places], split, source.validation_share)
        if not chosen:
            raise ValueError(f"{source.name}: one image cannot be split into training and validation; add more")
        places = [places[place] for place in chosen]
    weight = weight or float(sum(counts[place] for place in places))
    return ListPart(source.name, rows, array("q", places), weight)  # forked workers share its memory


def shard_part(source: Sharded, split: Split, weight: float = 1.0) -> ShardPart:
    """The shards of a split; of a source that names no validation split, the samples whose id falls into ours."""
    belongs = any_name if "validation" in source.shards else InSplit(split)
    return ShardPart(source.name, source, _name_of(source.name, source.shards, split), belongs, weight)


def _name_of(source: str, splits: Mapping[str, Any], split: Split) -> str:
    """The source's name of what holds our split. Raises ValueError if all its splits are others (test)."""
    for name in (split, "train", ""):
        if name in splits:
            return name
    raise ValueError(f"{source}: has no split to train on, only {', '.join(splits)}")
