"""Sources read as a whole: a folder, JSON of BLIP, LLaVA, COCO, Karpathy or Visual Genome, JSON lines, CSV.

Rows about the same image become one record with all its captions and questions.
"""

import csv
import difflib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy

from xformer_mllm.data.records import (
    CAPTIONS,
    IMAGE_SUFFIXES,
    VALIDATION_SHARE,
    Record,
    Rows,
    broken_record,
    check_broken,
    is_missing,
    question_of,
    record_of,
    shorten,
    texts_of,
)
from xformer_mllm.data.table import Table
from xformer_mllm.files import parse_json, printable, read_json

FOLDER_VALIDATION_SHARE = 0.1  # folders are small
FOLDER_LAYOUT = "expected e.g. cat.jpg and cat.txt beside it, with the caption on its first line"
KARPATHY_FIELDS = {"filename": str, "split": str, "sentences": list}
KARPATHY_SPLITS = {"restval": "train", "val": "validation"}
IMAGES = ("image", "file_name")  # the key of a row's image; the second is that of Hugging Face's imagefolder
URLS = frozenset({"url", "URL"})
METADATA = frozenset({"metadata.jsonl", "metadata.csv"})  # of imagefolder
IMAGEFOLDER_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
UNNAMED = "\0"  # id of a question that is still to be numbered within its image
PLACEHOLDER = "<image>"  # in the questions of LLaVA
TEXT_ONLY = "without an image (text only)"
DESCRIBE = frozenset(
    {
        "Create a compact narrative representing the image presented.",
        "Describe the image concisely.",
        "Give a brief description of the image.",
        "Give a short and clear explanation of the subsequent image.",
        "Offer a succinct explanation of the picture presented.",
        "Present a compact description of the photo's key features.",
        "Provide a brief description of the given image.",
        "Relay a brief, clear account of the picture shown.",
        "Render a clear and concise summary of the photo.",
        "Share a concise interpretation of the image provided.",
        "Summarize the visual content of the image.",
        "Write a terse but informative summary of the picture.",
    }
)
"""LLaVA's prompts for a brief description (its paper's table 11, and its pretraining data): their answer is a caption."""
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


def read_json_lines_source(file: Path, images: Path | None) -> ListSource:
    """Read JSON lines: a row of `read_json_source`'s lists per line."""
    return _rows_source(file, "JSON lines", _lines(file), _bases(file, images))


def read_csv_source(file: Path, images: Path | None) -> ListSource:
    """Read CSV with a header: "image" or "file_name", and a caption, or a question with its answer."""
    return _rows_source(file, "CSV", _csv_rows(file), _bases(file, images))


def read_json_source(file: Path, content: Any, images: Path | None) -> ListSource:
    """Read a JSON file with the given content; a list may come as an iterator. images: their folder, if not beside it.

    Raises ValueError if the format is unknown, FileNotFoundError if the images are missing.
    """
    bases = _bases(file, images)
    if is_karpathy(content):
        return _list_source(file, "Karpathy's split", _karpathy_records(file, content), bases)
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        return _list_source(file, "COCO captions", {"": _coco(file, content)}, bases)
    rows = iter(content if isinstance(content, list | Iterator) else ())
    first = next(rows, None)
    if isinstance(first, dict):
        rows = chain([first], rows)
        if "regions" in first:
            return _list_source(file, "Visual Genome's regions", {"": _regions(rows, bases)}, bases)
        kind = "LLaVA's conversations" if "conversations" in first else 'a JSON list of {"image", "caption"}'
        return _rows_source(file, kind, ((f"row {index}", row) for index, row in enumerate(rows)), bases)
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


def _rows_source(file: Path, kind: str, rows: Iterable[tuple[str, Any]], bases: list[Path]) -> ListSource:
    rows = iter(rows)
    first = list(islice(rows, 1))
    skipped = {TEXT_ONLY: 0}
    records = _grouped(chain(first, rows), file, skipped)
    return _list_source(file, kind, {"": records}, bases, skipped, first[0][1] if first else None)


def _list_source(
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
            for where, row in _lines(file) if file.suffix == ".jsonl" else _csv_rows(file):
                if isinstance(row, dict) and isinstance(row.get("file_name"), str):
                    row = {**row, "file_name": (name.parent / row["file_name"]).as_posix()}
                yield f"{name} {where}", row

    skipped = {**skipped, TEXT_ONLY: 0}
    every = rows()
    first = list(islice(every, 1))
    records = list(_grouped(chain(first, every), folder, skipped))
    listed = [record for record in records if "broken" not in record]
    skipped["not in the metadata"] = max(0, images - len(records))
    names = [IMAGEFOLDER_SPLITS.get(Path(record["id"]).parts[0], "") for record in listed]
    splits: dict[str, list[Record]] = {"": [record for record in records if "broken" in record]}
    for name, record in zip(names, listed, strict=True):
        splits.setdefault(name if all(names) else "", []).append(record)
    kind = f"Hugging Face's imagefolder with {' and '.join(sorted({file.name for file in metadata}))}"
    return _list_source(folder, kind, splits, [folder], skipped, first[0][1] if first else None)


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


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the value of each line; a ValueError where it is not JSON."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {number}", parse_json(line)
                except json.JSONDecodeError as error:
                    yield f"line {number}", ValueError(f"not valid JSON, {error.msg}")
                except ValueError as error:
                    yield f"line {number}", error


def _csv_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield each row by the header's names; a ValueError where it has more fields. Raises ValueError if it is not CSV."""
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                many = None in row
                why = ValueError("more fields than the header; put texts with commas in quotes") if many else None
                yield f"line {reader.line_num}", why or row
        except csv.Error as error:
            raise ValueError(f"{file}:{reader.reader.line_num}: not valid CSV ({error})") from None


def _grouped(rows: Iterable[tuple[str, Any]], file: Path, skipped: dict[str, int]) -> Iterator[Record]:
    """Yield one record per image, in the order of their first rows. skipped: rows of `TEXT_ONLY` are added to it."""
    broken: list[Record] = []
    hashes = array("q")  # of the rows' images
    table = Table(_usable_rows(rows, file, skipped, broken, hashes))
    yield from broken
    for _, alike in groupby(table.select(_together(hashes)), key=lambda row: hash(row["image"])):
        of_image: dict[str, list[Record]] = {}
        for row in alike:
            of_image.setdefault(row["image"], []).append(row)
        for image, same in of_image.items():
            captions = [caption for row in same for caption in row["captions"]]
            questions: list[dict[str, Any]] = []
            for row in same:
                numbered = enumerate(row["questions"], len(questions))
                questions += [
                    {**each, "id": f"{image}/{number}"} if each["id"] == UNNAMED else each for number, each in numbered
                ]
            yield record_of(image, image, captions, questions)


def _usable_rows(
    rows: Iterable[tuple[str, Any]], file: Path, skipped: dict[str, int], broken: list[Record], hashes: array
) -> Iterator[Record]:
    """Yield each row as a record; broken ones go into `broken`, and the hashes of the others' images into `hashes`."""
    foreign: dict[str, Record] = {}
    for where, row in rows:
        if isinstance(row, dict) and _is_text_only(row):
            skipped[TEXT_ONLY] += 1
            continue
        if isinstance(row, dict) and row.keys() & URLS and not row.keys() & set(IMAGES):
            raise ValueError(f"{file}: lists URLs, not images; download them with img2dataset (docs/data.md)")
        try:
            image = _image_of(row)
            texts, asked = _conversation_of(row) if "conversations" in row else _texts_of_row(row)
            answered = [question_of(UNNAMED, each) for each in asked]
            if not all(each["question"] and each["answers"] for each in answered):
                raise ValueError("an empty question or no answer")
        except ValueError as error:
            broken.append(broken_record(where, str(error)))
            continue
        record = record_of(image, image, texts, answered)
        if "broken" in record:
            foreign[image] = record
            continue
        hashes.append(hash(image))
        yield record
    broken += foreign.values()


def _together(hashes: array) -> array:
    """Order rows so that those with equal hashes follow each other, at the place of the first; int64 indices."""
    _, first, group = numpy.unique(numpy.frombuffer(hashes, numpy.int64), return_index=True, return_inverse=True)
    return array("q", numpy.argsort(first[group], kind="stable").tobytes())


def _is_text_only(row: Mapping[str, Any]) -> bool:
    """Return whether a row is a conversation without an image or a video, as some of LLaVA's are."""
    seen = (value for key, value in row.items() if str(key).startswith(("image", "video")))
    return "conversations" in row and all(map(is_missing, seen))


def _image_of(row: Any) -> str:
    """Return the path of a row's image. Raises ValueError with what is broken."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError("not an object")
    image = next((row[key] for key in IMAGES if not is_missing(row.get(key))), None)
    if image is None:
        raise ValueError('no "image"')
    if not isinstance(image, str):
        raise ValueError(f'"image" is {json.dumps(image)[:40]}, not a path')
    return image


def _texts_of_row(row: Mapping[str, Any]) -> tuple[list[str], list[Mapping[str, Any]]]:
    """Return the captions and the questions of a row. Raises ValueError with what is broken."""
    key = next((key for key in CAPTIONS if not is_missing(row.get(key))), None)
    texts = texts_of(row[key]) if key else []
    if "question" in row:
        return texts, [row]
    if not texts:
        known = any(name in row for name in CAPTIONS)
        raise ValueError("an empty caption" if known else 'neither "caption" nor "question"')
    return texts, []


def _conversation_of(row: Mapping[str, Any]) -> tuple[list[str], list[Mapping[str, Any]]]:
    """Return the captions and the questions of LLaVA's {"conversations": [{"from", "value"}]}.

    Each human turn is a question without the placeholder of the image, and the next turn its answer. A single question
    of `DESCRIBE` also makes its answer a caption. Raises ValueError with what is broken.
    """
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError('"conversations" is not a list of {"from", "value"}')
    speakers = [turn.get("from") for turn in turns]
    if speakers != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError('the turns of "conversations" are not from "human" and "gpt" in turn')
    asked: list[Mapping[str, Any]] = []
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):
        question = human.get("value")
        if isinstance(question, str):
            question = question.replace(PLACEHOLDER, "").strip()
        asked.append({"question": question, "answer": gpt.get("value")})
    described = len(asked) == 1 and isinstance(question, str) and question in DESCRIBE
    return texts_of(asked[0]["answer"]) if described else [], asked


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
