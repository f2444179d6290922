"""Lists of images in one file: JSON of BLIP, LLaVA, COCO, Karpathy or Visual Genome, JSON lines, CSV."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from xformer_mllm.data.records import (
    VALIDATION_SHARE,
    Record,
    Rows,
    broken_record,
    check_broken,
    record_of,
    texts_of,
)
from xformer_mllm.data.rows import TEXT_ONLY, by_image, csv_rows, json_lines
from xformer_mllm.data.table import Table
from xformer_mllm.files import printable, read_json

KARPATHY_FIELDS = {"filename": str, "split": str, "sentences": list}
KARPATHY_SPLITS = {"restval": "train", "val": "validation"}
FORMS = {
    '[{"image", "caption"}]': ("image", "caption"),
    '[{"image", "question", "answer"}]': ("image", "question", "answer"),
    'LLaVA\'s [{"image", "conversations"}]': ("image", "conversations"),
    'imagefolder\'s {"file_name", "text"}': ("file_name", "text"),
    'COCO\'s {"images", "annotations"}': ("images", "annotations"),
    'Karpathy\'s {"images": [{"filename", "split", "sentences"}]}': ("images",),
    'Visual Genome\'s [{"id", "regions"}]': ("id", "regions"),
    'a mixture {"sources"}': ("sources",),
}
"""The known forms, as messages name them, and their keys."""
ALIKE = 0.6  # least likeness of two keys
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
        check_broken(self.name, len(self.broken), total, self.broken, "records")


def read_json_lines_source(file: Path, images: Path | None) -> ListSource:
    """Read JSON lines: a row of `read_json_source`'s lists per line."""
    return rows_source(file, "JSON lines", json_lines(file), _bases(file, images))


def read_csv_source(file: Path, images: Path | None) -> ListSource:
    """Read CSV with a header: "image" or "file_name", and a caption, or a question with its answer."""
    return rows_source(file, "CSV", csv_rows(file), _bases(file, images))


def read_json_source(file: Path, content: Any, images: Path | None) -> ListSource:
    """Read a JSON file with the given content; a list may come as an iterator. images: their folder, if not beside it.

    Raises ValueError if the format is unknown, FileNotFoundError if the images are missing.
    """
    bases = _bases(file, images)
    if is_karpathy(content):
        return list_source(file, "Karpathy's split", _karpathy_records(file, content), bases)
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        return list_source(file, "COCO captions", {"": _coco(file, content)}, bases)
    rows = iter(content if isinstance(content, list | Iterator) else ())
    first = next(rows, None)
    if isinstance(first, dict):
        rows = chain([first], rows)
        if "regions" in first:
            return list_source(file, "Visual Genome's regions", {"": _regions(rows, bases)}, bases)
        kind = "LLaVA's conversations" if "conversations" in first else 'a JSON list of {"image", "caption"}'
        return rows_source(file, kind, ((f"row {index}", row) for index, row in enumerate(rows)), bases)
    raise ValueError(f"{file}: unknown format; {_known_forms(content)}; see docs/data.md")


def _known_forms(content: Any) -> str:
    """Name the form whose keys are nearest to those of an object, and all known forms."""
    forms = f"known are {', '.join(FORMS)}"
    if not isinstance(content, dict) or not content:
        return forms

    def likeness(form: str) -> float:
        keys = list(map(str, content))
        ratios = (max(difflib.SequenceMatcher(None, wanted, key).ratio() for key in keys) for wanted in FORMS[form])
        return sum(ratio if ratio >= ALIKE else -0.5 for ratio in ratios)

    nearest = max(FORMS, key=likeness)
    keys = ", ".join(f'"{printable(str(key))}"' for key in list(content)[:8])
    if likeness(nearest) <= 0:
        return f"its keys are {keys}; {forms}"
    missing = ", ".join(f'"{key}"' for key in FORMS[nearest] if key not in content)
    return f"its keys are {keys}; nearest is {nearest}{f', but {missing} is missing' if missing else ''}; {forms}"


def rows_source(file: Path, kind: str, rows: Iterable[tuple[str, Any]], bases: list[Path]) -> ListSource:
    rows = iter(rows)
    first = list(islice(rows, 1))
    skipped = {TEXT_ONLY: 0}
    records = by_image(chain(first, rows), file, skipped)
    return list_source(file, kind, {"": records}, bases, skipped, first[0][1] if first else None)


def list_source(
    file: Path,
    kind: str,
    splits: Mapping[str, Iterable[Record]],
    bases: list[Path],
    skipped: Mapping[str, int] | None = None,
    first: Any = None,
) -> ListSource:
    """first: the first row, for the message that none is usable."""
    broken: dict[str, str] = {}
    tables = {split: Table(_usable(records, broken)) for split, records in splits.items()}
    tables = {split: table for split, table in tables.items() if len(table)}
    if not tables:
        causes = [f"{name}: {why}" for name, why in list(broken.items())[:1]]
        causes += [f"{count:,} {reason}" for reason, count in (skipped or {}).items() if count]
        why = f" ({'; '.join(causes)})" if causes else ""
        known = not isinstance(first, dict) or any(set(keys) <= first.keys() for keys in FORMS.values())
        forms = "" if known else f"; {_known_forms(first)}"
        raise ValueError(f"{file}: no image with a caption or a question{why}{forms}")
    base, dropped = _locate(tables, bases, file)
    for table in tables.values():
        table.find_images_in(base, dropped)
    return ListSource(str(file), kind, tables, broken, skipped or {})


def _usable(records: Iterable[Record], broken: dict[str, str]) -> Iterator[Record]:
    """Yield the records that are not broken; the others go into `broken`."""
    for record in records:
        if "broken" in record:
            broken[record["id"]] = record["broken"]
        else:
            yield record


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
        try:
            texts = texts_of(row.get("caption")) if isinstance(row, dict) else []
        except ValueError as error:
            yield broken_record(f"annotations[{index}]", str(error))
            continue
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


def _regions(content: Iterable[Any], bases: list[Path]) -> Iterator[Record]:
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


def _locate(splits: Mapping[str, Table], bases: list[Path], file: Path) -> tuple[Path, int]:
    """Return the folder of the images, and how many leading folders of their paths to drop.

    Listed paths may begin with folders of their author's machine (BLIP's do). The first images are tried, at least one
    of which must exist.
    """
    first = [Path(record["image"]) for table in splits.values() for record in islice(table, MAX_PROBED)]
    for path in first:
        for base in bases:
            for dropped in range(len(path.parts)):
                if (base / Path(*path.parts[dropped:])).is_file():
                    return base, dropped
    raise FileNotFoundError(
        f"{file}: images not found (tried {first[0]} and others in {' and '.join(map(str, bases))}); "
        "set their folder with --images"
    )
