"""Files that list images with captions or questions: JSON of BLIP, COCO, Karpathy and Visual Genome, and JSON lines.

Rows about the same image become one record, with all its captions and questions.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xformer_mllm.data.captions import FOLDER_VALIDATION_SHARE, find_captions
from xformer_mllm.data.karpathy import is_karpathy, read_karpathy
from xformer_mllm.data.records import (
    VALIDATION_SHARE,
    Record,
    Rows,
    Table,
    broken,
    check_broken,
    question_of,
    record_of,
    sound,
    texts_of,
)

KARPATHY_SPLITS = {"restval": "train", "val": "validation"}  # ours, where the name is another
LOOKED_FOR = 100  # images, until one is found
REGION_FOLDERS = ("VG_100K", "VG_100K_2")  # Visual Genome's images come in two parts


@dataclass(frozen=True)
class Listed:
    """A source whose records are all known at once.

    rows: by split, "" where the source has none; validation_share: what we keep of such a one. broken: what cannot be
    used, id -> why. left_out: what is not meant to be used, and how often.
    """

    name: str
    format: str
    rows: Mapping[str, Rows]
    broken: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    validation_share: float = VALIDATION_SHARE


def read_folder(folder: Path) -> Listed:
    """A folder of images with a .txt beside each. Raises as `find_captions`."""
    found = find_captions(folder)
    rows = {"": Table(found.records)}
    kind = "a folder of images with a .txt beside each"
    return Listed(str(folder), kind, rows, {}, found.left_out, FOLDER_VALIDATION_SHARE)


def read_json_lines_source(file: Path, images: Path | None, any_share: bool = False) -> Listed:
    """JSON lines: {"image", "caption"} or {"image", "question", "answers" or "answer"}, one object a line."""
    return _listed(file, "JSON lines", {"": _grouped(_lines(file), file)}, images, any_share)


def read_json_source(file: Path, content: Any, images: Path | None, any_share: bool = False) -> Listed:
    """What a JSON file lists. content: what `file` holds. images: the folder of the images, if not beside the file.

    Raises ValueError if the file is of no known format or, without any_share, if more than 1 % of it is broken;
    FileNotFoundError if its images are not there.
    """
    if is_karpathy(content):
        return _listed(file, "Karpathy's split", _karpathy(file, content), images, any_share)
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        return _listed(file, "COCO captions", {"": _coco(file, content)}, images, any_share)
    if isinstance(content, list) and content and isinstance(content[0], dict):
        if "regions" in content[0]:
            regions = _regions(content, _bases(file, images))
            return _listed(file, "Visual Genome's regions", {"": regions}, images, any_share)
        rows = ((f"row {place}", row) for place, row in enumerate(content))
        return _listed(file, 'a JSON list of {"image", "caption"}', {"": _grouped(rows, file)}, images, any_share)
    raise ValueError(
        f"{file}: none of the known forms: a list of {{image, caption}}, COCO's {{images, annotations}}, Karpathy's "
        "{images: [{sentences}]}, Visual Genome's [{regions}], or a mixture {sources}; see docs/data.md"
    )


def _listed(
    file: Path, kind: str, splits: Mapping[str, Iterable[Record]], images: Path | None, any_share: bool
) -> Listed:
    faults: dict[str, str] = {}
    found = {split: list(sound(records, faults)) for split, records in splits.items()}
    total = sum(map(len, found.values())) + len(faults)
    if total == len(faults):
        why = "".join(f" ({name}: {why})" for name, why in list(faults.items())[:1])
        raise ValueError(f"{file}: no image with a caption or a question{why}")
    if not any_share:
        check_broken(str(file), len(faults), total, [f"{name} ({why})" for name, why in faults.items()], "records")
    placed = _placed(found, _bases(file, images), file)
    return Listed(str(file), kind, {split: Table(records) for split, records in placed.items() if records}, faults)


# ------------------------------------------------------------------------------------------------------------- formats


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    """The value of each line, an exception where it is not JSON."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    yield f"line {number}", error


def _grouped(rows: Iterable[tuple[str, Any]], file: Path) -> Iterator[Record]:
    """{"image", "caption"} and {"image", "question", "answers"} -> a record for each image, by its first row."""
    captions: dict[str, list[str]] = {}
    questions: dict[str, list[dict[str, Any]]] = {}
    for where, row in rows:
        if fault := _fault(row, file):
            yield broken(where, fault)
            continue
        captions.setdefault(row["image"], []).extend(texts_of(row.get("caption")))
        asked = questions.setdefault(row["image"], [])
        if "question" in row:
            asked.append(question_of(f"{row['image']}/{len(asked)}", row))
    for image, texts in captions.items():
        yield record_of(image, image, texts, questions[image])


def _fault(row: Any, file: Path) -> str | None:
    """What is wrong with a row."""
    if isinstance(row, json.JSONDecodeError):
        return f"not valid JSON, {row.msg}"
    if not isinstance(row, dict):
        return "not an object"
    if not isinstance(row.get("image"), str) or not row["image"]:
        if "url" in row:
            raise ValueError(f"{file}: lists addresses, not images; download them with img2dataset (docs/data.md)")
        return 'no "image"'
    if "question" in row:
        question = question_of("", row)
        return None if question["question"] and question["answers"] else "a question without words or an answer"
    if "caption" not in row:
        return 'neither "caption" nor "question"'
    return None if texts_of(row["caption"]) else "an empty caption"


def _coco(file: Path, content: Mapping[str, Any]) -> Iterator[Record]:
    """{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}, as captions_train2014.json.

    The images are in the folder that the file is named after: train2014.
    """
    folder = file.stem.rpartition("_")[2]
    names: dict[Any, str] = {}
    captions: dict[Any, list[str]] = {}
    for place, image in enumerate(content["images"]):
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or "id" not in image:
            yield broken(f"images[{place}]", 'no "id" or "file_name"')
            continue
        names[image["id"]] = image["file_name"]
        captions[image["id"]] = []
    for place, row in enumerate(content["annotations"]):
        texts = texts_of(row.get("caption")) if isinstance(row, dict) else []
        if not texts:
            yield broken(f"annotations[{place}]", "no caption")
        elif row.get("image_id") not in captions:
            yield broken(f"annotations[{place}]", f"of an image that is not listed, {row.get('image_id')}")
        else:
            captions[row["image_id"]] += texts
    for image_id, texts in captions.items():
        yield record_of(names[image_id], f"{folder}/{names[image_id]}", texts)


def _karpathy(file: Path, content: Any) -> dict[str, list[Record]]:
    splits: dict[str, list[Record]] = {}
    for image in read_karpathy(file, content):
        split = KARPATHY_SPLITS.get(image.split, image.split)
        splits.setdefault(split, []).append(record_of(image.path, image.path, image.captions))
    return splits


def _regions(content: list[Any], bases: list[Path]) -> Iterator[Record]:
    """[{"id", "regions": [{"phrase"}]}], as region_descriptions.json: every phrase is a caption of the image."""
    second = {path.name for base in bases for path in (base / REGION_FOLDERS[1]).glob("*.jpg")}
    for place, image in enumerate(content):
        number = image.get("id", image.get("image_id")) if isinstance(image, dict) else None
        regions = image.get("regions") if isinstance(image, dict) else None
        if number is None or not isinstance(regions, list):
            yield broken(f"[{place}]", 'no "id" or "regions"')
            continue
        phrases = [region.get("phrase") for region in regions if isinstance(region, dict)]
        name = f"{number}.jpg"
        yield record_of(name, f"{REGION_FOLDERS[name in second]}/{name}", phrases)


# ------------------------------------------------------------------------------------------------ where images lie


def _bases(file: Path, images: Path | None) -> list[Path]:
    """Where images may lie: in the folder that was named, else beside the file or beside its folder (annotations/)."""
    return [images] if images else [file.parent, file.absolute().parent.parent]


def _placed(splits: Mapping[str, list[Record]], bases: list[Path], file: Path) -> dict[str, list[Record]]:
    """The records with their images' whole paths.

    A path may begin with folders that are not there (BLIP's are those of its authors' machines): how many is seen from the
    first images, of which one at least must be found.
    """
    first = [Path(record["image"]) for records in splits.values() for record in records[:LOOKED_FOR]]
    for path in first:
        for base in bases:
            for skipped in range(len(path.parts)):
                if (base / Path(*path.parts[skipped:])).is_file():
                    return {split: _below(base, skipped, records) for split, records in splits.items()}
    looked = " and ".join(str(base) for base in bases)
    raise FileNotFoundError(
        f"{file}: its images are not there (looked in {looked} for {first[0]} and others); name the folder with --images"
    )


def _below(base: Path, skipped: int, records: list[Record]) -> list[Record]:
    return [{**record, "image": str(base / Path(*Path(record["image"]).parts[skipped:]))} for record in records]
