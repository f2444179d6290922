"""Open a data source by its name:

    DIR                         a folder of images with a .txt beside each
    DIR                         Hugging Face's imagefolder: images and metadata.jsonl or metadata.csv
    FILE.json                   a list of {"image", "caption"} (BLIP) or {"image", "conversations"} (LLaVA); COCO
                                captions; Karpathy; Visual Genome's regions
    FILE.jsonl, FILE.csv        {"image", "caption"} or {"image", "question", "answers"} per line
    DIR, FILE.tar, PATTERN      webdataset shards: a folder of .tar, one, or cc12m/{00000..01242}.tar
    DIR                         a Hugging Face data set written by `save_to_disk`
    hf:NAME                     a Hugging Face data set, streamed
    FILE.json                   a mixture: {"sources": [{"source", "weight", "images"}, ...]}

Lists become data sets with a length; shards, streamed data sets and mixtures become endless streams.
"""

import logging
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from xformer_mllm.data.formats import (
    ListSource,
    read_csv_source,
    read_folder,
    read_json_lines_source,
    read_json_source,
)
from xformer_mllm.data.huggingface import PREFIX, find_on_hub, is_saved, read_saved
from xformer_mllm.data.records import CaptionItems, Field, Images, QuestionItems, Split, shorten, split_indices
from xformer_mllm.data.shards import ShardSource, find_shards
from xformer_mllm.data.streams import BUFFER, ListPart, ShardPart, Stream, StreamPart, ValidationStream, in_split
from xformer_mllm.data.transforms import Transform
from xformer_mllm.files import is_json_list, read_json, read_json_list

logger = logging.getLogger(__name__)

SOURCE_FORMS = "a folder, FILE.json, FILE.jsonl, FILE.csv, FILE.tar, a pattern of .tar files, or hf:NAME"


@dataclass(frozen=True)
class Mixture:
    """Several sources, drawn from in proportion to their weights; None: the number of the source's captions."""

    name: str
    sources: tuple[ListSource | ShardSource, ...]
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
    """Open images with captions: items {"id", "image", "caption"}, with one caption per image, resampled each epoch.

    Args:
        source: see above.
        split: the source's own if it has a validation split, else by a hash of the id: 1 % for validation (10 % of a
            folder). A test split is never used.
        images: folder of the images of a list, or of the sources of a mixture, if not beside the file.
        transform: makes "image" uint8[3, S, S]; without it, it is a PIL image.
        seed: of captions, crops and the order of streams.
        rank, world: this training process and their number; streams split themselves.
        buffer: size of each shuffle buffer, in samples; for shards.
        cleaned: apply `records.clean` to captions.

    Returns:
        Training: `records.Images`, with a length and `set_epoch`, or an endless `streams.Stream`.
        Validation: `records.Images`, or a finite `streams.ValidationStream`, always in the same order.

    Raises FileNotFoundError or ValueError if the source does not exist, has an unknown format or no captions, or more
    than 1 % of it is broken.
    """
    return _open(source, split, CaptionItems(transform, seed, cleaned), images, rank, world, buffer)


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
    """Open images with questions: an item is a list of {"id", "image_id", "image", "question", "answer"} on one image.

    questions_per_image: maximum per image, resampled each epoch; None for all. The rest is as in `open_captions`.
    """
    return _open(source, split, QuestionItems(transform, seed, questions_per_image), images, rank, world, buffer)


def source_exists(source: str) -> bool:
    """Return whether the source is an existing file or folder; names of shards and of the Hub always pass."""
    return source.startswith(PREFIX) or _names_shards(source) or Path(source).exists()


def _names_shards(source: str) -> bool:
    return Path(source).suffix == ".tar" or "*" in source or "{" in source


def find_source(
    source: str, images: Path | None = None, allow_broken: bool = False
) -> ListSource | ShardSource | Mixture:
    """Find a source. Raises as `open_captions`. allow_broken: accept any share of broken records."""
    found = _find(source, images)
    if not allow_broken:
        for one in found.sources if isinstance(found, Mixture) else (found,):
            if isinstance(one, ListSource):
                one.check()
    return found


def _find(source: str, images: Path | None) -> ListSource | ShardSource | Mixture:
    if source.startswith(PREFIX):
        return find_on_hub(source)
    path = Path(source)
    if _names_shards(source):
        return find_shards(source)
    if not path.exists():
        raise FileNotFoundError(f"{source}: no such data source; expected {SOURCE_FORMS}")
    if path.suffix == ".jsonl":
        return read_json_lines_source(path, images)
    if path.suffix == ".csv":
        return read_csv_source(path, images)
    if path.suffix == ".json":
        content = read_json_list(path) if path.is_file() and is_json_list(path) else read_json(path)
        if isinstance(content, dict) and "sources" in content:
            return _read_mixture(path, content, images or path.parent)
        return read_json_source(path, content, images)
    if not path.is_dir():
        raise ValueError(f"{source}: unknown format; expected {SOURCE_FORMS}")
    if is_saved(path):
        return read_saved(path)
    return find_shards(source) if any(path.glob("*.tar")) else read_folder(path)


def _read_mixture(file: Path, content: Mapping[str, Any], base: Path) -> Mixture:
    """base: the folder of relative paths."""
    entries = content["sources"]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'{file}: "sources" must be a list of {{"source", "weight", "images"}}')
    found, weights = [], []
    for index, entry in enumerate(entries):
        where = f"{file}: sources[{index}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
            raise ValueError(f'{where}: needs a "source"')
        if unknown := entry.keys() - {"source", "weight", "images", "comment"}:
            raise ValueError(f"{where}: unknown {sorted(unknown)[0]!r}; known: source, weight, images, comment")
        weight = entry.get("weight")
        if weight is not None and not (isinstance(weight, int | float) and weight > 0):
            raise ValueError(f"{where}: the weight must be a positive number, not {weight!r}")
        name = entry["source"]
        images = base / entry["images"] if "images" in entry else None
        one = _find(name if name.startswith(PREFIX) else str(base / name), images)
        if isinstance(one, Mixture):
            raise ValueError(f"{where}: is a mixture itself; list its sources here")
        found.append(one)
        weights.append(weight)
    return Mixture(str(file), tuple(found), tuple(weights))


def _open(
    source: str,
    split: Split,
    item: CaptionItems | QuestionItems,
    images: Path | None,
    rank: int,
    world: int,
    buffer: int,
) -> Dataset:
    found = find_source(source, images)
    if isinstance(found, ListSource):
        part = list_part(found, split, item.field)
        if split == "train":  # logged once
            _log_skipped(found)
        return Images(found.name, part.rows, item, part.indices, found.broken if split == "train" else None)
    parts = _parts(found, split, item.field)
    if split == "train":
        return Stream(source, parts, item, item.seed, rank, world, buffer)
    return ValidationStream(parts, item)


def _log_skipped(found: ListSource) -> None:
    counts = {**found.skipped, "broken": len(found.broken)}
    parts = [f"{count:,} {reason}" for reason, count in counts.items() if count]
    if parts:
        names = f": {shorten(found.broken_names())}" if found.broken else ""
        logger.warning("%s: skipped %s%s", found.name, ", ".join(parts), names)


def _parts(found: Mixture | ShardSource, split: Split, field: Field) -> list[StreamPart]:
    if not isinstance(found, Mixture):
        return [shard_part(found, split)]
    return [
        list_part(one, split, field, weight)
        if isinstance(one, ListSource)
        else shard_part(one, split, weight or _size(one, found.name))
        for one, weight in zip(found.sources, found.weights, strict=True)
    ]


def _size(source: ShardSource, mixture: str) -> int:
    size = source.size(_name_of(source.name, source.shards, "train"))
    if not size:
        raise ValueError(
            f'{mixture}: the size of {source.name} is unknown (its shards have no NAME_stats.json); give it a "weight"'
        )
    return size


def list_part(source: ListSource, split: Split, field: Field, weight: float | None = None) -> ListPart:
    """Return the rows of a split with captions, or questions. weight: by default their number.

    Raises ValueError if there are none.
    """
    rows = source.rows[_name_of(source.name, source.rows, split)]
    counts = rows.counts[field]
    indices = array("q", (index for index, count in enumerate(counts) if count))  # forked workers share its memory
    if not indices:
        other: Field = "captions" if field == "questions" else "questions"
        hint = f"; it has {other} (xformer train stage2 --text {other})" if any(rows.counts[other]) else ""
        raise ValueError(f"{source.name}: no {field}{hint}")
    if "validation" not in source.rows:
        ids = (name for name, count in zip(rows.ids(), counts, strict=True) if count)
        chosen = split_indices(ids, split, source.validation_share)
        if not chosen:
            raise ValueError(f"{source.name}: one image cannot be split into training and validation; add more")
        indices = array("q", (indices[index] for index in chosen))
    weight = weight or float(sum(counts[index] for index in indices))
    return ListPart(source.name, rows, indices, weight)


def shard_part(source: ShardSource, split: Split, weight: float = 1.0) -> ShardPart:
    """Return the shards of a split; without a validation split, the samples that the hash of their id puts there."""
    belongs = None if "validation" in source.shards else partial(in_split, split)
    return ShardPart(source.name, source, _name_of(source.name, source.shards, split), belongs, weight)


def _name_of(source: str, splits: Mapping[str, Any], split: Split) -> str:
    """Return the source's name for a split. Raises ValueError if it has only a test split."""
    for name in (split, "train", ""):
        if name in splits:
            return name
    raise ValueError(f"{source}: has no split to train on, only {', '.join(splits)}")
