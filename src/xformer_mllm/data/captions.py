"""Your own pictures: a folder where each picture has its caption in a .txt beside it.

    animals/cat.jpg
    animals/cat.txt        A cat asleep on a chair.

The first line with text is the caption; what follows it may be other languages, as in Debian's
tuxpaint-stamps-default. Folders inside the folder are read too.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from PIL import Image
from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
MAX_BROKEN_SHARE = 0.01  # a download loses a picture here and there; more than this is a mistake somewhere
LAYOUT = "expected e.g. cat.jpg and beside it cat.txt with the caption in its first line"


class CaptionFolder(Dataset):
    """Pictures with captions, sorted by name: items {"id", "image", "caption"}; id is the path inside the folder.

    Pictures without a .txt or with an empty one are left out; `skipped` counts them by reason and one line is logged.

    A picture that cannot be read when it is asked for is replaced by the next one in order that can, so that a run
    and its resumption see the same items; `broken` holds what was wrong with each, by id. Once more than 1 % of the
    pictures are broken, ValueError. (Every worker process of a loader counts the broken pictures that it met itself.)
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        loader: Callable[[Path], Image.Image],
        split: Literal["train", "validation"] | None = None,
        validation_share: float = 0.1,
    ):
        """loader: path -> PIL RGB, raising ValueError or OSError for a picture that cannot be read: `load_image` of
        xformer_mllm.model.images. It is handed in because data/ and model/ do not know each other.

        split: None for every picture; else the pictures whose name's hash falls into that split: a picture keeps its
        split when others are added or removed.

        Raises FileNotFoundError if there is no such folder, ValueError if it holds no picture with a caption.
        """
        self.folder = Path(folder)
        self._loader = loader
        if not self.folder.exists():
            raise FileNotFoundError(f"{self.folder}: no such folder; {LAYOUT}")
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: not a folder; {LAYOUT}")
        self.skipped = {"without a .txt": 0, "with an empty .txt": 0, "in SVG, which is not read": 0}
        self.broken: dict[str, str] = {}
        found = self._find()
        if not found:
            raise ValueError(f"{self.folder}: no picture with a caption{self._skipped_line()}; {LAYOUT}")
        if any(self.skipped.values()) and split != "validation":  # said once, by its training split
            logger.warning("%s: %d pictures with captions%s", self.folder, len(found), self._skipped_line())
        self._items = found if split is None else _split(found, validation_share)[split]
        if not self._items:
            raise ValueError(f"{self.folder}: one picture cannot be split into training and validation; add more")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        for offset in range(len(self)):
            name, caption = self._items[(index + offset) % len(self)]
            if name in self.broken:
                continue
            try:
                image = self._loader(self.folder / name)
            except (ValueError, OSError) as error:
                self._note_broken(name, error)
                continue
            return {"id": name, "image": image, "caption": caption}
        raise AssertionError("unreachable: _note_broken stops long before every picture is broken")

    def _find(self) -> list[tuple[str, str]]:
        """(path inside the folder, caption) of every picture that has one."""
        found = []
        for path in sorted(self.folder.rglob("*")):
            suffix = path.suffix.lower()
            if suffix == ".svg":
                self.skipped["in SVG, which is not read"] += 1
            if suffix not in PICTURE_SUFFIXES:
                continue
            text = path.with_suffix(".txt")
            if not text.is_file():
                self.skipped["without a .txt"] += 1
                continue
            caption = _first_line(text)
            if not caption:
                self.skipped["with an empty .txt"] += 1
                continue
            found.append((path.relative_to(self.folder).as_posix(), caption))
        return found

    def _skipped_line(self) -> str:
        parts = [f"{count} {reason}" for reason, count in self.skipped.items() if count]
        return f" (left out: {', '.join(parts)})" if parts else ""

    def _note_broken(self, name: str, error: Exception) -> None:
        self.broken[name] = str(error)
        logger.warning("left out a broken picture: %s", error)
        if len(self.broken) > MAX_BROKEN_SHARE * len(self):
            names = ", ".join(list(self.broken)[:5]) + (", ..." if len(self.broken) > 5 else "")
            raise ValueError(
                f"{self.folder}: {len(self.broken)} of {len(self)} pictures cannot be read, more than "
                f"{MAX_BROKEN_SHARE:.0%}: {names}; remove or replace them"
            ) from error


def _first_line(path: Path) -> str:
    """The first line with text, '' if none. A byte that is no UTF-8 becomes a replacement character."""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return next((line.strip() for line in lines if line.strip()), "")


def _split(items: list[tuple[str, str]], validation_share: float) -> dict[str, list[tuple[str, str]]]:
    """By the hash of the name. Of the fewest pictures, too, there is one for validation: the one with the lowest hash."""
    validation = {name for name, _ in items if _place(name) < validation_share} or {
        min((n for n, _ in items), key=_place)
    }
    return {
        "train": [item for item in items if item[0] not in validation],
        "validation": [item for item in items if item[0] in validation],
    }


def _place(name: str) -> float:
    """Uniform in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
