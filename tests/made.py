"""Small sources of images, made for the tests of the data sets."""

import io
import json
import tarfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from PIL import Image


def jpeg(red: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (red % 256, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def write_image(path: Path, red: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(red))
    return path


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def tar(path: Path, files: dict[str, bytes]) -> Path:
    """A tar file of these files, in this order."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def shard(path: Path, first: int, number: int, broken: Collection[int] = ()) -> Path:
    """A shard as img2dataset writes it, of samples first ... first + number - 1; those in `broken` are no JPEGs."""
    files = {}
    for place in range(first, first + number):
        key = f"{place:09}"
        files[f"{key}.jpg"] = b"no image" if place in broken else jpeg(place)
        files[f"{key}.txt"] = f"caption {place}".encode()
        files[f"{key}.json"] = json.dumps({"key": key, "caption": f"caption {place}", "width": 8}).encode()
    return tar(path, files)


def shards(folder: Path, number: int, each: int, broken: Collection[int] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(number):
        shard(folder / f"{place:05}.tar", place * each, each, broken)
    return folder
