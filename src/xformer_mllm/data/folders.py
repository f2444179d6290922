"""Folders of images: with a .txt beside each, or Hugging Face's imagefolder with metadata.jsonl or metadata.csv."""

import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from xformer_mllm.data.formats import ListSource, list_source
from xformer_mllm.data.records import IMAGE_SUFFIXES, Record, broken_record, record_of, shorten
from xformer_mllm.data.rows import TEXT_ONLY, by_image, csv_rows, json_lines
from xformer_mllm.data.table import Table
from xformer_mllm.files import printable

FOLDER_VALIDATION_SHARE = 0.1  # folders are small
FOLDER_LAYOUT = "expected e.g. cat.jpg and cat.txt beside it, with the caption on its first line"
METADATA = frozenset({"metadata.jsonl", "metadata.csv"})  # of imagefolder
IMAGEFOLDER_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def read_folder(folder: Path) -> ListSource:
    """Read images with captions in .txt files beside them, in the folder and its subfolders.

    Hidden files and folders are left out, and linked folders read. The caption is the first line with text; others may
    follow, such as translations. A record's id is its path inside the folder. A folder with metadata.jsonl or
    metadata.csv is Hugging Face's imagefolder instead. Raises ValueError if no image has a caption.
    """
    files, skipped = _files(folder)
    if metadata := [file for file in files if file.name in METADATA]:
        images = sum(file.suffix.lower() in IMAGE_SUFFIXES for file in files)
        return _read_imagefolder(folder, metadata, images, skipped)
    skipped |= {"without a .txt": 0, "with an empty .txt": 0, "in SVG, which is not supported": 0}
    every = list(_folder_records(folder, files, skipped))
    broken = {record["id"]: record["broken"] for record in every if "broken" in record}
    records = [record for record in every if "broken" not in record]
    if records:
        kind = "a folder of images with a .txt beside each"
        return ListSource(str(folder), kind, {"": Table(records)}, broken, skipped, FOLDER_VALIDATION_SHARE)
    lists = [*folder.glob("annotations/captions_*.json"), *folder.glob("*.json"), *folder.glob("*.jsonl")]
    if lists:
        raise ValueError(
            f"{folder}: no image has a .txt beside it; pass the file that lists the images: "
            + " or ".join(map(str, sorted(lists)[:3]))
        )
    counts = [f"{count} {reason}" for reason, count in skipped.items() if count]
    if counts:
        raise ValueError(f"{folder}: no image with a caption ({', '.join(counts)}); {FOLDER_LAYOUT}")
    raise ValueError(f"{folder}: no images found; expected files such as .jpg or .png, with a .txt beside each")


def _read_imagefolder(folder: Path, metadata: list[Path], images: int, skipped: dict[str, int]) -> ListSource:
    """Read Hugging Face's imagefolder: images, and metadata.jsonl or .csv files about those below them.

    images: their number. skipped: files that are not read. The folders train, validation and test, if all listed images
    are in them, are the splits.
    """
    if len({file.parent for file in metadata}) < len(metadata):
        raise ValueError(f"{folder}: has a metadata.jsonl and a metadata.csv; pass the file to read")

    def rows() -> Iterator[tuple[str, Any]]:
        for file in metadata:
            name = file.relative_to(folder)
            for where, row in json_lines(file) if file.suffix == ".jsonl" else csv_rows(file):
                if isinstance(row, dict) and isinstance(row.get("file_name"), str):
                    row = {**row, "file_name": (name.parent / row["file_name"]).as_posix()}
                yield f"{name} {where}", row

    skipped = {**skipped, TEXT_ONLY: 0}
    every = rows()
    first = list(islice(every, 1))
    records = list(by_image(chain(first, every), folder, skipped))
    listed = [record for record in records if "broken" not in record]
    skipped["not in the metadata"] = max(0, images - len(records))
    names = [IMAGEFOLDER_SPLITS.get(Path(record["id"]).parts[0], "") for record in listed]
    splits: dict[str, list[Record]] = {"": [record for record in records if "broken" in record]}
    for name, record in zip(names, listed, strict=True):
        splits.setdefault(name if all(names) else "", []).append(record)
    kind = f"Hugging Face's imagefolder with {' and '.join(sorted({file.name for file in metadata}))}"
    return list_source(folder, kind, splits, [folder], skipped, first[0][1] if first else None)


def _files(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """Find the files in a folder and its subfolders, sorted, and count what is left out, by reason.

    Hidden files and folders, such as `._a.jpg` and `.ipynb_checkpoints`, are left out. Linked folders are read, except
    where they lead back to a folder around them.
    """
    files: list[Path] = []
    foreign: list[str] = []
    closed: list[str] = []

    def walk(inside: Path, around: frozenset[tuple[int, int]]) -> None:
        about = inside.stat()
        place = (about.st_dev, about.st_ino)
        if place in around:
            return
        try:
            entries = sorted(os.scandir(inside), key=lambda entry: entry.name)
        except OSError:
            closed.append(str(inside.relative_to(folder)))
            return
        for entry in entries:
            path = inside / entry.name
            if entry.name.startswith("."):
                continue
            if printable(entry.name) != entry.name:
                if entry.is_file() and path.suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                foreign.append(printable(path.relative_to(folder).as_posix()))
            elif entry.is_dir():
                walk(path, around | {place})
            else:
                files.append(path)

    walk(folder, frozenset())
    skipped = {f"whose name is not UTF-8 ({shorten(foreign)})": len(foreign)} if foreign else {}
    if closed:
        skipped[f"folders that cannot be read ({shorten(closed)})"] = len(closed)
    return sorted(files), skipped


def _folder_records(folder: Path, files: list[Path], skipped: dict[str, int]) -> Iterator[Record]:
    for path in files:
        suffix = path.suffix.lower()
        if suffix == ".svg":
            skipped["in SVG, which is not supported"] += 1
        if suffix not in IMAGE_SUFFIXES:
            continue
        if not path.with_suffix(".txt").is_file():
            skipped["without a .txt"] += 1
            continue
        try:
            text = path.with_suffix(".txt").read_text(encoding="utf-8-sig", errors="replace")
        except OSError as error:
            yield broken_record(path.relative_to(folder).as_posix(), f"its .txt cannot be read ({error.strerror})")
            continue
        caption = next((line.strip() for line in text.splitlines() if line.strip()), "")
        if not caption:
            skipped["with an empty .txt"] += 1
            continue
        yield record_of(path.relative_to(folder).as_posix(), path, caption)
