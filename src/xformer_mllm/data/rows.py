"""Rows of lists, each about an image -> records, one for each image with all of its captions and questions."""

import csv
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy

from xformer_mllm.data.records import CAPTIONS, Record, broken_record, is_missing, question_of, record_of, texts_of
from xformer_mllm.data.table import Table
from xformer_mllm.files import parse_json

UNNAMED = "\0"  # id of a question that is still to be numbered within its image
PLACEHOLDER = "<image>"  # in the questions of LLaVA
TEXT_ONLY = "without an image (text only)"
URLS = frozenset({"url", "URL"})
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
IMAGES = ("image", "file_name")  # the key of a row's image; the second is that of Hugging Face's imagefolder


def json_lines(file: Path) -> Iterator[tuple[str, Any]]:
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


def csv_rows(file: Path) -> Iterator[tuple[str, Any]]:
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


def by_image(rows: Iterable[tuple[str, Any]], file: Path, skipped: dict[str, int]) -> Iterator[Record]:
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
