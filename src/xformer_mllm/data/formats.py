"""Sources read as a whole: a folder, JSON of BLIP, COCO, Karpathy or Visual Genome, JSON lines.

Rows about the same image become one record with all its captions and questions.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xformer_mllm.data.records import (
    IMAGE_SUFFIXES,
    VALIDATION_SHARE,
    Record,
    Rows,
    Table,
    broken_record,
    check_broken,
    question_of,
    record_of,
    texts_of,
)
from xformer_mllm.files import read_json

FOLDER_VALIDATION_SHARE = 0.1  # folders are small
FOLDER_LAYOUT = "expected e.g. cat.jpg and cat.txt beside it, with the caption on its first line"
KARPATHY_FIELDS = {"filename": str, "split": str, "sentences": list}
KARPATHY_SPLITS = {"restval": "train", "val": "validation"}
MAX_PROBED = 100  # images tried in the search for their folder
REGION_FOLDERS = ("VG_100K", "VG_100K_2")  # Visual Genome's images come in two parts


@dataclass(frozen=True)
class ListSource:
    """A source with random access to its records.

    rows: by split; the key is "" if the source has none, and `validation_share` of it is then held out. broken: reasons
    of unusable records, by id. skipped: counts of files that are not samples, by reason.
    """

    name: str
    format: str
    rows: Mapping[str, Rows]
    broken: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    validation_share: float = VALIDATION_SHARE

    def usable(self) -> Iterator[tuple[Rows, int]]:
        """Yield the rows and the index of each record with a caption or a question."""
        for rows in self.rows.values():
            texts = zip(rows.counts["captions"], rows.counts["questions"], strict=True)
            yield from ((rows, index) for index, counts in enumerate(texts) if any(counts))

    def broken_names(self) -> list[str]:
        return [f"{name} ({why})" for name, why in self.broken.items()]

    def check(self) -> None:
        """Raise ValueError if more than 1 % of the records are broken."""
        total = len(self.broken) + sum(1 for _ in self.usable())
        check_broken(self.name, len(self.broken), total, self.broken_names(), "records")


def read_folder(folder: Path) -> ListSource:
    """Read images with captions in .txt files beside them, in the folder and its subfolders.

    The caption is the first line with text; others may follow, such as translations. A record's id is its path inside
    the folder. Raises ValueError if no image has a caption.
    """
    skipped = {"without a .txt": 0, "with an empty .txt": 0, "in SVG, which is not supported": 0}
    records = list(_folder_records(folder, skipped))
    if records:
        kind = "a folder of images with a .txt beside each"
        return ListSource(str(folder), kind, {"": Table(records)}, {}, skipped, FOLDER_VALIDATION_SHARE)
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


def read_json_lines_source(file: Path, images: Path | None) -> ListSource:
    """Read JSON lines: {"image", "caption"} or {"image", "question", "answers" or "answer"} per line."""
    return _list_source(file, "JSON lines", {"": _grouped(_lines(file), file)}, _bases(file, images))


def read_json_source(file: Path, content: Any, images: Path | None) -> ListSource:
    """Read a JSON file with the given content. images: their folder, if not beside the file.

    Raises ValueError if the format is unknown, FileNotFoundError if the images are missing.
    """
    bases = _bases(file, images)
    if is_karpathy(content):
        return _list_source(file, "Karpathy's split", _karpathy_records(file, content), bases)
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        return _list_source(file, "COCO captions", {"": _coco(file, content)}, bases)
    if isinstance(content, list) and content and isinstance(content[0], dict):
        if "regions" in content[0]:
            return _list_source(file, "Visual Genome's regions", {"": _regions(content, bases)}, bases)
        rows = ((f"row {index}", row) for index, row in enumerate(content))
        return _list_source(file, 'a JSON list of {"image", "caption"}', {"": _grouped(rows, file)}, bases)
    raise ValueError(
        f"{file}: unknown format; expected a list of {{image, caption}}, COCO's {{images, annotations}}, Karpathy's "
        "{images: [{sentences}]}, Visual Genome's [{regions}], or a mixture {sources}; see docs/data.md"
    )


def _list_source(file: Path, kind: str, splits: Mapping[str, Iterable[Record]], bases: list[Path]) -> ListSource:
    broken: dict[str, str] = {}
    found: dict[str, list[Record]] = {}
    for split, records in splits.items():
        for record in records:
            if "broken" in record:
                broken[record["id"]] = record["broken"]
            else:
                found.setdefault(split, []).append(record)
    if not found:
        why = "".join(f" ({name}: {why})" for name, why in list(broken.items())[:1])
        raise ValueError(f"{file}: no image with a caption or a question{why}")
    base, dropped = _locate(found, bases, file)
    for record in (record for records in found.values() for record in records):
        record["image"] = base / Path(*Path(record["image"]).parts[dropped:])
    return ListSource(str(file), kind, {split: Table(records) for split, records in found.items()}, broken)


def _folder_records(folder: Path, skipped: dict[str, int]) -> Iterator[Record]:
    for path in sorted(folder.rglob("*")):
        suffix = path.suffix.lower()
        if suffix == ".svg":
            skipped["in SVG, which is not supported"] += 1
        if suffix not in IMAGE_SUFFIXES:
            continue
        if not path.with_suffix(".txt").is_file():
            skipped["without a .txt"] += 1
            continue
        text = path.with_suffix(".txt").read_text(encoding="utf-8-sig", errors="replace")
        caption = next((line.strip() for line in text.splitlines() if line.strip()), "")
        if not caption:
            skipped["with an empty .txt"] += 1
            continue
        yield record_of(path.relative_to(folder).as_posix(), path, caption)


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the value of each line; an exception where it is not JSON."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    yield f"line {number}", error


def _grouped(rows: Iterable[tuple[str, Any]], file: Path) -> Iterator[Record]:
    """Yield one record per image, in the order of their first rows."""
    captions: dict[str, list[str]] = {}
    questions: dict[str, list[dict[str, Any]]] = {}
    for where, row in rows:
        if why := _why_broken(row, file):
            yield broken_record(where, why)
            continue
        captions.setdefault(row["image"], []).extend(texts_of(row.get("caption")))
        of_image = questions.setdefault(row["image"], [])
        if "question" in row:
            of_image.append(question_of(f"{row['image']}/{len(of_image)}", row))
    for image, texts in captions.items():
        yield record_of(image, image, texts, questions[image])


def _why_broken(row: Any, file: Path) -> str | None:
    if isinstance(row, json.JSONDecodeError):
        return f"not valid JSON, {row.msg}"
    if not isinstance(row, dict):
        return "not an object"
    if not isinstance(row.get("image"), str) or not row["image"]:
        if "url" in row:
            raise ValueError(f"{file}: lists URLs, not images; download them with img2dataset (docs/data.md)")
        return 'no "image"'
    if "question" in row:
        question = question_of("", row)
        return None if question["question"] and question["answers"] else "an empty question or no answer"
    if "caption" not in row:
        return 'neither "caption" nor "question"'
    return None if texts_of(row["caption"]) else "an empty caption"


def _coco(file: Path, content: Mapping[str, Any]) -> Iterator[Record]:
    """Read {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}, as captions_train2014.json.

    The images are in the folder that the file is named after: train2014.
    """
    folder = file.stem.rpartition("_")[2]
    names: dict[Any, str] = {}
    captions: dict[Any, list[str]] = {}
    for index, image in enumerate(content["images"]):
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or "id" not in image:
            yield broken_record(f"images[{index}]", 'no "id" or "file_name"')
            continue
        names[image["id"]] = image["file_name"]
        captions[image["id"]] = []
    for index, row in enumerate(content["annotations"]):
        texts = texts_of(row.get("caption")) if isinstance(row, dict) else []
        if not texts:
            yield broken_record(f"annotations[{index}]", "no caption")
        elif row.get("image_id") not in captions:
            yield broken_record(f"annotations[{index}]", f"image {row.get('image_id')} is not listed")
        else:
            captions[row["image_id"]] += texts
    for image_id, texts in captions.items():
        yield record_of(names[image_id], f"{folder}/{names[image_id]}", texts)


@dataclass(frozen=True, slots=True)
class KarpathyImage:
    """An image of Karpathy's file. path: relative to the folder of images. image_id: COCO's, else the file's."""

    split: str
    path: str
    image_id: str
    captions: tuple[str, ...]


def is_karpathy(content: Any) -> bool:
    """Return whether the content of a JSON file is Karpathy's split."""
    images = content.get("images") if isinstance(content, dict) else None
    return bool(images and isinstance(images, list) and isinstance(images[0], dict) and "sentences" in images[0])


def read_karpathy(file: Path, content: Any = None) -> list[KarpathyImage]:
    """Read the images of Karpathy & Li's dataset_coco.json or dataset_flickr30k.json, in order.

        {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "cocoid": 391895,
                     "split": "test", "sentences": [{"raw": "A man with a red helmet.", ...}, ...]}, ...]}

    COCO has the splits train (82,783 images), restval (30,504, used for training), val and test (5,000 each).
    Flickr30k has neither `filepath` nor `cocoid`. content: of the file, if already read.

    Raises FileNotFoundError, or ValueError naming the file and the position.
    """
    content = read_json(file) if content is None else content
    if not is_karpathy(content):
        raise ValueError(f'{file}: not Karpathy\'s {{"images": [{{"filename", "split", "sentences"}}]}}')
    return [_karpathy_image(image, f"{file}: images[{index}]") for index, image in enumerate(content["images"])]


def _karpathy_image(image: Any, where: str) -> KarpathyImage:
    for name, kind in KARPATHY_FIELDS.items():
        if not isinstance(image, dict) or not isinstance(image.get(name), kind):
            raise ValueError(f"{where}.{name} is missing or not a {'list' if kind is list else 'string'}")
    captions = [
        text["raw"] for text in image["sentences"] if isinstance(text, dict) and isinstance(text.get("raw"), str)
    ]
    if len(captions) != len(image["sentences"]):
        raise ValueError(f'{where}.sentences: one has no string "raw"')
    folder = image.get("filepath")
    path = f"{folder}/{image['filename']}" if folder else image["filename"]
    image_id = image.get("cocoid", image.get("imgid", image["filename"]))
    return KarpathyImage(image["split"], path, str(image_id), tuple(captions))


def _karpathy_records(file: Path, content: Any) -> dict[str, list[Record]]:
    splits: dict[str, list[Record]] = {}
    for image in read_karpathy(file, content):
        split = KARPATHY_SPLITS.get(image.split, image.split)
        splits.setdefault(split, []).append(record_of(image.path, image.path, image.captions))
    return splits


def _regions(content: list[Any], bases: list[Path]) -> Iterator[Record]:
    """Read [{"id", "regions": [{"phrase"}]}], as region_descriptions.json: every phrase is a caption of the image."""
    second = {path.name for base in bases for path in (base / REGION_FOLDERS[1]).glob("*.jpg")}
    for index, image in enumerate(content):
        number = image.get("id", image.get("image_id")) if isinstance(image, dict) else None
        regions = image.get("regions") if isinstance(image, dict) else None
        if number is None or not isinstance(regions, list):
            yield broken_record(f"[{index}]", 'no "id" or "regions"')
            continue
        phrases = [region.get("phrase") for region in regions if isinstance(region, dict)]
        name = f"{number}.jpg"
        yield record_of(name, f"{REGION_FOLDERS[name in second]}/{name}", phrases)


def _bases(file: Path, images: Path | None) -> list[Path]:
    """Return where images may be: the given folder, else the file's and its parent (COCO has annotations/)."""
    return [images] if images else [file.parent, file.absolute().parent.parent]


def _locate(splits: Mapping[str, list[Record]], bases: list[Path], file: Path) -> tuple[Path, int]:
    """Return the folder of the images, and how many leading folders of their paths to drop.

    Listed paths may begin with folders of their author's machine (BLIP's do). The first images are tried, at least one
    of which must exist.
    """
    first = [Path(record["image"]) for records in splits.values() for record in records[:MAX_PROBED]]
    for path in first:
        for base in bases:
            for dropped in range(len(path.parts)):
                if (base / Path(*path.parts[dropped:])).is_file():
                    return base, dropped
    raise FileNotFoundError(
        f"{file}: images not found (tried {first[0]} and others in {' and '.join(map(str, bases))}); "
        "set their folder with --images"
    )
