"""`xformer data shard`: write any data source as webdataset shards, as img2dataset does.

    00000.tar            000000000.jpg (or .png, .webp), .txt (the first caption), .json ("id", "captions", "questions",
                         width and height, ...), 000000001.jpg, ...
    00000_stats.json     {"count", "successes", "failed"}
    shards.json          the settings; shards with other settings are not written to the same folder

A sample is named after its number in the source; broken samples leave gaps, as failed downloads do in img2dataset.
Shards are written atomically; a killed run resumes with the first missing one.
"""

import io
import json
import logging
import tarfile
from collections import deque
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from xformer_mllm.commands import ShardConfig
from xformer_mllm.data.formats import ListSource
from xformer_mllm.data.records import MIN_COUNTED, Record, check_broken, open_image
from xformer_mllm.data.shards import stats_file
from xformer_mllm.data.sources import Mixture, find_source
from xformer_mllm.files import atomic_path, check_new_folder, read_json, write_whole
from xformer_mllm.model.images import load_image

logger = logging.getLogger(__name__)

ABOUT = "shards.json"
KEPT = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}  # copied unchanged
QUALITY = 95  # of JPEG, as img2dataset's


def shard(config: ShardConfig) -> Path:
    """Run `xformer data shard` and return the folder.

    Raises ValueError if the folder holds other shards, or once more than 1 % of the samples are broken.
    """
    found = find_source(config.source, config.images)
    if isinstance(found, Mixture):
        raise ValueError(f"{config.source}: is a mixture; shard each of its sources")
    splits = list(found.rows if isinstance(found, ListSource) else found.shards)
    split = config.split or (splits[0] if len(splits) == 1 else "train")
    if split not in splits:
        raise ValueError(f"{config.source}: has no split {split!r}; --split takes {', '.join(splits) or 'none'}")
    _write_settings(config, split)
    records: Iterable[Record]
    if isinstance(found, ListSource):
        rows = found.rows[split]
        total: int | None = len(rows)
        records = (rows[index] for index in range(len(rows)))
    else:
        total = found.size(split)
        records = chain.from_iterable(map(found.read, found.shards[split]))
    shards = count = failed = 0
    broken: dict[str, str] = {}
    with tqdm(records, total=total, unit="image") as bar:
        remaining = iter(bar)
        for first in remaining:
            samples = chain([first], islice(remaining, config.samples_per_shard - 1))
            path = config.output_dir / f"{shards:05}.tar"
            if path.is_file() and stats_file(path).is_file():  # the stats are written last
                stats = read_json(stats_file(path))
                deque(samples, maxlen=0)  # skip them
            else:
                stats = _write_shard(path, samples, shards, config, broken)
            shards += 1
            count, failed = count + stats["count"], failed + stats["failed"]
            check_broken(config.source, failed, max(count, MIN_COUNTED), broken, "samples")
    skipped = f"; {failed:,} broken samples skipped" if failed else ""
    print(f"{config.output_dir}: {count - failed:,} samples in {shards:,} shards{skipped}")
    return config.output_dir


def _write_settings(config: ShardConfig, split: str) -> None:
    """Write the settings to the folder. Raises ValueError if it holds something else."""
    about = {
        "source": config.source,
        "split": split,
        "samples_per_shard": config.samples_per_shard,
        "shortest_side": config.shortest_side,
    }
    file = config.output_dir / ABOUT
    if not file.is_file():
        check_new_folder(config.output_dir)
        write_whole(file, json.dumps(about, indent=2) + "\n")
    elif (there := read_json(file)) != about:
        raise ValueError(f"{config.output_dir}: holds other shards ({json.dumps(there)}); choose another --output-dir")


def _write_shard(
    path: Path, samples: Iterable[Record], number: int, config: ShardConfig, broken: dict[str, str]
) -> dict[str, int]:
    """Write a shard and its stats file. Broken samples go into `broken`, with the reason."""
    digits = max(4, len(str(config.samples_per_shard - 1)))
    count = failed = 0
    try:
        with atomic_path(path) as partial, tarfile.open(partial, "w") as tar:
            for index, record in enumerate(samples):
                count += record.get("lost", 1)
                try:
                    files = _files(record, f"{number:05}{index:0{digits}}", config.shortest_side)
                except (ValueError, OSError) as error:
                    logger.warning("skipped: %s", error)
                    broken[record["id"]] = str(error)
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


def _files(record: Record, key: str, shortest_side: int | None) -> dict[str, bytes]:
    """Return a sample's files by name. Raises ValueError or OSError if it is broken."""
    if "broken" in record:
        raise ValueError(f"{record['id']}: {record['broken']}")
    suffix, content, sizes = _image(record, shortest_side)
    files = {key + suffix: content}
    about = {"key": key, "id": record["id"], "status": "success"}
    about |= {kind: record[kind] for kind in ("captions", "questions") if record[kind]}
    if record["captions"]:
        files[f"{key}.txt"] = record["captions"][0].encode()
        about["caption"] = record["captions"][0]
    return {**files, f"{key}.json": json.dumps({**about, **sizes}, ensure_ascii=False).encode()}


def _image(record: Record, shortest_side: int | None) -> tuple[str, bytes, dict[str, int]]:
    """Return an image's suffix, file content and sizes. It is always decoded, to check it."""
    raw = record["image"]
    opened = open_image(raw, record["id"])
    kept = KEPT.get(opened.format or "")
    image = load_image(opened)
    sizes = {"original_width": image.width, "original_height": image.height}
    side = min(image.size)
    file = io.BytesIO()
    if shortest_side and side > shortest_side:
        width, height = (max(1, round(length * shortest_side / side)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image.save(file, "JPEG", quality=QUALITY)
        suffix, content = ".jpg", file.getvalue()
    elif kept and not isinstance(raw, Image.Image):
        suffix, content = kept, raw if isinstance(raw, bytes) else Path(raw).read_bytes()
    else:
        image.save(file, "PNG")
        suffix, content = ".png", file.getvalue()
    return suffix, content, {**sizes, "width": image.width, "height": image.height}
