"""Webdataset shards as img2dataset writes them: tar files of samples whose files share a name up to the first dot.

    00000.tar            000000000.jpg, 000000000.txt (the caption), 000000000.json (url, caption, width, ...),
                         000000001.jpg, ...
    00000_stats.json     the number of samples; optional

`xformer data shard` also writes "captions" (a list) and "questions" ([{"id", "question", "answers"}]) into the .json.
A broken sample or shard becomes a broken record; its neighbours are read as usual.
"""

import logging
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from xformer_mllm.data.records import (
    IMAGE_SUFFIXES,
    Record,
    broken_record,
    one_line,
    question_of,
    record_of,
    shorten,
)
from xformer_mllm.files import parse_json, printable, read_json

logger = logging.getLogger(__name__)

TAR_END = bytes(1024)  # a tar file ends with two blocks of zeros
SCATTERED = (
    "the files of a sample do not follow each other in the shard; write it again in the order of names: "
    "tar --sort=name -cf NEW.tar -C FOLDER ."
)
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")

Wanted = Callable[[int, str], bool]
"""Whether to read a sample, from its index in the shard and its id."""


@dataclass(frozen=True)
class ShardSource:
    """A source read sequentially, shard by shard. shards: by split; the key is "" if the source has no splits."""

    name: str
    shards: Mapping[str, Sequence[str]]
    format: ClassVar[str]

    def read(self, shard: str, wanted: Wanted | None = None) -> Iterator[Record]:
        """Yield the records of a shard, always in the same order."""
        raise NotImplementedError

    def size(self, split: str) -> int | None:
        """Return the number of samples, None if unknown without reading them."""
        raise NotImplementedError


class TarShards(ShardSource):
    """Local tar files."""

    format = "webdataset shards"

    def read(self, shard: str, wanted: Wanted | None = None) -> Iterator[Record]:
        return read_shard(Path(shard), wanted)

    def truncated(self) -> list[str]:
        """Return the shards that are truncated or missing."""
        return [shard for of_split in self.shards.values() for shard in of_split if not _is_complete(Path(shard))]

    def size(self, split: str) -> int | None:
        sizes = [stated_size(Path(shard)) for shard in self.shards[split]]
        return None if None in sizes else sum(size or 0 for size in sizes)


def find_shards(source: str) -> TarShards:
    """Find shards: one tar file, a folder of them, or a pattern such as cc12m/{00000..01242}.tar or cc12m/*.tar.

    Raises FileNotFoundError if there is none.
    """
    path = Path(source)
    if path.is_dir():
        files = _named(path.glob("*.tar"))
    elif "*" in source:
        files = _named(path.parent.glob(path.name))
    else:
        files = [Path(name) for name in _expanded(source)]
    if not any(file.is_file() for file in files):
        raise FileNotFoundError(f"{source}: no shards found; expected files named NAME.tar (docs/data.md)")
    return TarShards(source, {"": tuple(map(str, files))})


def _named(files: Iterable[Path]) -> list[Path]:
    """Sort files; hidden ones are left out, and those whose name is not UTF-8, with a warning."""
    shown = sorted(file for file in files if not file.name.startswith("."))
    foreign = [printable(str(file)) for file in shown if printable(str(file)) != str(file)]
    if foreign:
        logger.warning("skipped %s: the name is not UTF-8; rename it", shorten(foreign))
    return [file for file in shown if printable(str(file)) == str(file)]


def _expanded(pattern: str) -> list[str]:
    """Expand braces as a shell does: a/{00..02}.tar -> a/00.tar, a/01.tar, a/02.tar."""
    found = BRACES.search(pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    names = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
    return [path for name in names for path in _expanded(pattern[: found.start()] + name + pattern[found.end() :])]


def stats_file(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}_stats.json")


def stated_size(shard: Path) -> int | None:
    """Return the number of samples in a shard's stats file, None without one."""
    if not stats_file(shard).is_file():
        return None
    successes = read_json(stats_file(shard)).get("successes")
    return successes if isinstance(successes, int) else None


def read_shard(shard: Path, wanted: Wanted | None = None) -> Iterator[Record]:
    """Yield the records of a tar file; a truncated one ends with a broken record.

    A sample's files follow each other; where they do not, the reason of the broken records says so.

    Its "lost" is the number of samples missing according to the stats file, 1 without one.
    """
    done = 0
    scattered: bool | None = None  # unknown
    try:
        with tarfile.open(shard, "r:") as tar:
            for key, members in groupby(_files(tar), key=lambda member: _parts(member)[0]):
                name = printable(f"{shard.stem}/{key}")
                if wanted is None or wanted(done, name):
                    record = _record(name, {_parts(member)[1]: member for member in members}, tar)
                    if record.get("broken") in ("no image", "no caption"):
                        scattered = _is_scattered(shard) if scattered is None else scattered
                        record |= {"broken": SCATTERED} if scattered else {}
                    yield record
                done += 1
        fault = None if _is_complete(shard) else "cut short"
    except (tarfile.TarError, OSError) as error:
        fault = one_line(error)
    if fault:
        lost = max(1, (stated_size(shard) or 0) - done)
        yield broken_record(str(shard), f"the shard cannot be read to its end ({fault})", lost)


def _is_scattered(shard: Path) -> bool:
    """Return whether files of one sample have others between them, such as all images first. Reads names only."""
    seen: set[str] = set()
    try:
        with tarfile.open(shard, "r:") as tar:
            for key, _ in groupby(_files(tar), key=lambda member: _parts(member)[0]):
                if key in seen:
                    return True
                seen.add(key)
    except (tarfile.TarError, OSError):
        pass  # where it is cut short is found by reading it
    return False


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
        if member.isfile() and not PurePosixPath(member.name).name.startswith("."):
            yield member


def _parts(member: tarfile.TarInfo) -> tuple[str, str]:
    """Split a name at the first dot of its last part: the sample's key, and the suffix."""
    path = PurePosixPath(member.name)
    stem, _, suffix = path.name.partition(".")
    return str(path.parent / stem), f".{suffix.lower()}"


def _is_complete(shard: Path) -> bool:
    if not shard.is_file() or shard.stat().st_size < len(TAR_END):
        return False
    with shard.open("rb") as file:
        file.seek(-len(TAR_END), 2)
        return file.read() == TAR_END


def _record(name: str, members: Mapping[str, tarfile.TarInfo], tar: tarfile.TarFile) -> Record:
    image = next((member for suffix, member in members.items() if suffix in IMAGE_SUFFIXES), None)
    about: Any = {}
    if ".json" in members:
        try:
            about = parse_json(_read(tar, members[".json"]).decode("utf-8-sig"))
        except ValueError as error:  # of JSON or of UTF-8
            return broken_record(name, f"its .json is not valid ({error})")
        if not isinstance(about, dict):
            return broken_record(name, "its .json is not an object")
    captions = about.get("captions")
    if not captions:
        has_text = ".txt" in members
        captions = _read(tar, members[".txt"]).decode("utf-8-sig", "replace") if has_text else about.get("caption")
    asked = about.get("questions") or []
    if not isinstance(asked, list) or not all(isinstance(each, dict) for each in asked):
        return broken_record(name, 'the "questions" of its .json are not a list of objects')
    try:
        questions = [
            question_of(f"{name}/{n}", {"question_id": each.get("id"), **each}) for n, each in enumerate(asked)
        ]
    except ValueError as error:
        return broken_record(name, str(error))
    return record_of(name, image and _read(tar, image), captions, questions)


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "only regular files are passed"
    return file.read()
