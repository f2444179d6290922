"""`xformer data shard`: write any data source as webdataset shards, as img2dataset does.

    00000.tar            000000000.jpg (or .png, .webp), .txt (the first caption), .json ("id", "captions", "questions",
                         width and height, ...), 000000001.jpg, ...
    00000_stats.json     {"count", "successes", "failed"}
    shards.json          the settings; shards with other settings are not written to the same folder

A sample is named after its number in the source; broken samples leave gaps, as failed downloads do in img2dataset.
Shards are written atomically: a killed run resumes with the first missing one.
"""

import io
import json
import logging
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image
from tqdm.auto import tqdm

from xformer_mllm.data.formats import ListSource
from xformer_mllm.data.records import MIN_COUNTED, Record, check_broken, open_image
from xformer_mllm.data.shards import ShardSource, stats_file
from xformer_mllm.data.sources import Mixture, find_source
from xformer_mllm.files import atomic_path, read_json, write_whole
from xformer_mllm.model.images import load_image

logger = logging.getLogger(__name__)

ABOUT = "shards.json"
KEPT = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}  # copied unchanged
QUALITY = 95  # of JPEG, as img2dataset's


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """Write any data source as webdataset shards, as img2dataset does."""

    source: Annotated[str, tyro.conf.Positional]
    """A folder, FILE.json, FILE.jsonl, shards (a folder of .tar, one, or a pattern) or hf:NAME; see docs/data.md."""
    output_dir: Path
    """Folder for the shards; rerun the same command to resume."""
    images: Path | None = None
    """Folder of the images of a list; by default that of the file."""
    split: str | None = None
    """Split of the source to write; by default its only one, or train."""
    samples_per_shard: int = 10_000
    """Samples per shard."""
    shortest_side: int | None = None
    """Resize larger images to this shorter side, in pixels; by default files are copied unchanged."""

    def __post_init__(self) -> None:
        """Raises ValueError for an invalid value."""
        for name in ("samples_per_shard", "shortest_side"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")


def shard(config: ShardConfig) -> Path:
    """Run `xformer data shard` and return the folder.

    Raises ValueError if the folder holds other shards, or once more than 1 % of the samples are broken.
    """
    found = find_source(config.source, config.images)
    if isinstance(found, Mixture):
        raise ValueError(f"{config.source}: is a mixture; shard each of its sources")
    split = _chosen_split(config, found.rows if isinstance(found, ListSource) else found.shards)
    _begin(config, split)
    records, total = _records(found, split)
    shards = count = failed = 0
    names: list[str] = []
    with tqdm(records, total=total, unit="image") as bar:
        for samples in _chunks(iter(bar), config.samples_per_shard):
            path = config.output_dir / f"{shards:05}.tar"
            stats = _stats(path) or _write_shard(path, samples, shards, config, names)
            for _ in samples:  # of a finished shard
                pass
            shards += 1
            count, failed = count + stats["count"], failed + stats["failed"]
            check_broken(config.source, failed, max(count, MIN_COUNTED), names, "samples")
    skipped = f"; {failed:,} broken samples skipped" if failed else ""
    print(f"{config.output_dir}: {count - failed:,} samples in {shards:,} shards{skipped}")
    return config.output_dir


def _chosen_split(config: ShardConfig, splits: Collection[str]) -> str:
    """The name of the split to write. Raises ValueError if the source does not have it."""
    wanted = config.split or (next(iter(splits)) if len(splits) == 1 else "train")
    if wanted not in splits:
        raise ValueError(f"{config.source}: has no split {wanted!r}; --split takes {', '.join(splits) or 'none'}")
    return wanted


def _begin(config: ShardConfig, split: str) -> None:
    """Write the settings to the folder. Raises ValueError if it holds something else."""
    about = {
        "source": config.source,
        "split": split,
        "samples_per_shard": config.samples_per_shard,
        "shortest_side": config.shortest_side,
    }
    folder, file = config.output_dir, config.output_dir / ABOUT
    if file.is_file():
        if (there := read_json(file)) != about:
            raise ValueError(f"{folder}: holds other shards ({json.dumps(there)}); name a new folder")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: not an empty folder; name a new one")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(about, indent=2) + "\n")


def _records(found: ListSource | ShardSource, split: str) -> tuple[Iterator[Record], int | None]:
    """A split's records in order, and their number if known."""
    if isinstance(found, ListSource):
        rows = found.rows[split]
        return (rows[place] for place in range(len(rows))), len(rows)
    return chain.from_iterable(found.read(shard) for shard in found.shards[split]), found.size(split)


def _chunks(records: Iterator[Record], size: int) -> Iterator[Iterator[Record]]:
    for first in records:
        yield chain([first], islice(records, size - 1))


def _stats(path: Path) -> dict[str, int] | None:
    """The contents of a finished shard's stats file, which is written last."""
    return read_json(stats_file(path)) if path.is_file() and stats_file(path).is_file() else None


def _write_shard(
    path: Path, samples: Iterator[Record], number: int, config: ShardConfig, names: list[str]
) -> dict[str, int]:
    """Write a shard and its stats file. The ids of broken samples go into `names`."""
    digits = len(str(config.samples_per_shard - 1))
    count = failed = 0
    try:
        with atomic_path(path) as partial, tarfile.open(partial, "w") as tar:
            for index, record in enumerate(samples):
                count += record.get("lost", 1)
                try:
                    files = _files(record, f"{number:05}{index:0{max(4, digits)}}", config.shortest_side)
                except BrokenError as error:
                    logger.warning("skipped: %s", error)
                    names.append(record["id"])
                    failed += record.get("lost", 1)
                    continue
                for name, content in files.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from error
    stats = {"count": count, "successes": count - failed, "failed": failed}
    write_whole(stats_file(path), json.dumps(stats, indent=2) + "\n")
    return stats


class BrokenError(ValueError):
    """The sample is broken, as opposed to an error of writing the shard."""


def _files(record: Record, key: str, shortest_side: int | None) -> dict[str, bytes]:
    """A sample's files by name. Raises BrokenError."""
    if "broken" in record:
        raise BrokenError(f"{record['id']}: {record['broken']}")
    try:
        suffix, content, about = _image(record, shortest_side)
    except (ValueError, OSError) as error:
        raise BrokenError(str(error)) from error
    texts = {"key": key, "id": record["id"], "status": "success"}
    texts |= {kind: record[kind] for kind in ("captions", "questions") if record[kind]}
    files = {key + suffix: content}
    if record["captions"]:
        files[f"{key}.txt"] = record["captions"][0].encode()
        texts["caption"] = record["captions"][0]
    return {**files, f"{key}.json": json.dumps({**texts, **about}, ensure_ascii=False).encode()}


def _image(record: Record, shortest_side: int | None) -> tuple[str, bytes, dict[str, int]]:
    """An image's suffix, file content and sizes. It is always decoded, to check it."""
    opened = open_image(record["image"], record["id"])
    kept = KEPT.get(opened.format or "")
    image = load_image(opened)
    about = {"original_width": image.width, "original_height": image.height}
    side = min(image.size)
    if shortest_side and side > shortest_side:
        size = [max(1, round(length * shortest_side / side)) for length in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        suffix, content = ".jpg", _encoded(image, "JPEG", quality=QUALITY)
    elif kept and not isinstance(record["image"], Image.Image):
        raw = record["image"]
        suffix, content = kept, raw if isinstance(raw, bytes) else Path(raw).read_bytes()
    else:
        suffix, content = ".png", _encoded(image, "PNG")
    return suffix, content, {**about, "width": image.width, "height": image.height}


def _encoded(image: Image.Image, kind: str, **settings: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()
