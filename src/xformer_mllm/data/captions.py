"""Your own images: a folder where each image has its caption in a .txt beside it.

    animals/cat.jpg
    animals/cat.txt        A cat asleep on a chair.

The first line with text is the caption; what follows it may be other languages, as in Debian's
tuxpaint-stamps-default. Folders inside the folder are read too.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xformer_mllm.data.records import CaptionItems, Images, Record, Split, Table, places_of, record_of

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
FOLDER_VALIDATION_SHARE = 0.1  # folders are small
LAYOUT = "expected e.g. cat.jpg and beside it cat.txt with the caption in its first line"


@dataclass(frozen=True)
class FoundCaptions:
    """What a folder holds: its records, whose ids are the paths inside the folder, sorted; and what was left out."""

    folder: Path
    records: list[Record]
    left_out: dict[str, int]

    def left_out_line(self) -> str:
        parts = [f"{count} {reason}" for reason, count in self.left_out.items() if count]
        return f" (left out: {', '.join(parts)})" if parts else ""


class CaptionFolder(Images):
    """Images with captions, sorted by name: items {"id", "image", "caption"}; id is the path inside the folder.

    Images without a .txt or with an empty one are left out; `skipped` counts them by reason and one line is logged.
    Broken images are replaced and counted, as `Images` says.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        split: Split | None = None,
        validation_share: float = FOLDER_VALIDATION_SHARE,
    ):
        """split: None for every image; else the images whose name's hash falls into that split: an image keeps its
        split when others are added or removed.

        Raises FileNotFoundError if there is no such folder, ValueError if it holds no image with a caption.
        """
        found = find_captions(Path(folder))
        self.skipped = found.left_out
        if any(self.skipped.values()) and split != "validation":  # said once, by its training split
            logger.warning("%s: %d images with captions%s", folder, len(found.records), found.left_out_line())
        ids = [record["id"] for record in found.records]
        places = range(len(ids)) if split is None else places_of(ids, split, validation_share)
        if not places:
            raise ValueError(f"{folder}: one image cannot be split into training and validation; add more")
        rows = Table(found.records[place] for place in places)
        super().__init__(str(folder), rows, CaptionItems(None, 0))


def find_captions(folder: Path) -> FoundCaptions:
    """Every image of a folder that has a caption. Raises as `CaptionFolder`."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; {LAYOUT}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder; {LAYOUT}")
    left_out = {"without a .txt": 0, "with an empty .txt": 0, "in SVG, which is not read": 0}
    found = FoundCaptions(folder, list(_records(folder, left_out)), left_out)
    if not found.records:
        raise ValueError(f"{folder}: no image with a caption{found.left_out_line()}; {LAYOUT}")
    return found


def _records(folder: Path, left_out: dict[str, int]) -> Iterator[Record]:
    for path in sorted(folder.rglob("*")):
        suffix = path.suffix.lower()
        if suffix == ".svg":
            left_out["in SVG, which is not read"] += 1
        if suffix not in IMAGE_SUFFIXES:
            continue
        text = path.with_suffix(".txt")
        if not text.is_file():
            left_out["without a .txt"] += 1
            continue
        caption = _first_line(text)
        if not caption:
            left_out["with an empty .txt"] += 1
            continue
        yield record_of(path.relative_to(folder).as_posix(), path, caption)


def _first_line(path: Path) -> str:
    """The first line with text, '' if none. A byte that is no UTF-8 becomes a replacement character."""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return next((line.strip() for line in lines if line.strip()), "")
