"""Webdataset shards, as img2dataset writes them: tar files of samples, whose files share a name up to the first dot.

    00000.tar            000000000.jpg, 000000000.txt (the caption), 000000000.json (url, caption, width, ...),
                         000000001.jpg, ...
    00000_stats.json     how many samples there are; optional

`xformer data shard` also writes "captions" (a list) and "questions" ([{"id", "question", "answers"}]) into the .json.
What is wrong with a sample or a shard is a broken record; the samples around it are read all the same.
"""

import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from xformer_mllm.data.captions import IMAGE_SUFFIXES
from xformer_mllm.data.records import Record, broken, one_line, record_of
from xformer_mllm.files import read_json

TAR_END = bytes(1024)  # two blocks of zeros end a tar file
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")

Wanted = Callable[[int, str], bool]
"""A sample's place in its shard and its id -> whether it is to be read; the others are passed over."""


def everything(_place: int, _name: str) -> bool:
    return True


class Sharded(Protocol):
    """A source that is read in order, shard by shard.

    name: as it was asked for. format: in words. shards: by split, "" where the source has none.
    """

    @property
    def name(self) -> str: ...

    @property
    def format(self) -> str: ...

    @property
    def shards(self) -> Mapping[str, Sequence[str]]: ...

    def read(self, shard: str, wanted: Wanted = everything) -> Iterator[Record]:
        """The records of a shard, in their order, always the same."""
        ...

    def size(self, split: str) -> int | None:
        """How many samples there are, if that is known without reading them all."""
        ...


@dataclass(frozen=True)
class TarShards:
    """Tar files on this machine."""

    name: str
    shards: Mapping[str, Sequence[str]]
    format: str = "webdataset shards"

    def read(self, shard: str, wanted: Wanted = everything) -> Iterator[Record]:
        return read_shard(Path(shard), wanted)

    def cut_short(self) -> list[str]:
        """The shards that are missing or that do not end as a tar file does."""
        shards = [Path(shard) for of_split in self.shards.values() for shard in of_split]
        return [str(shard) for shard in shards if not _is_complete(shard)]

    def size(self, split: str) -> int | None:
        sizes = [stated_size(Path(shard)) for shard in self.shards[split]]
        return None if None in sizes else sum(size or 0 for size in sizes)


def find_shards(source: str) -> TarShards:
    """The shards of a tar file, a folder of them, or a pattern as cc12m/{00000..01242}.tar or cc12m/*.tar.

    Raises FileNotFoundError if there is none.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.tar"))
    elif "*" in source:
        files = sorted(path.parent.glob(path.name))
    else:
        files = [Path(name) for name in _expanded(source)]
    if not any(file.is_file() for file in files):
        raise FileNotFoundError(f"{source}: no shards there (NAME.tar); see docs/data.md")
    return TarShards(source, {"": tuple(map(str, files))})


def _expanded(pattern: str) -> list[str]:
    """ "a/{00..02}.tar" -> a/00.tar, a/01.tar, a/02.tar, as a shell would."""
    found = BRACES.search(pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    names = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
    return list(
        chain.from_iterable(_expanded(pattern[: found.start()] + name + pattern[found.end() :]) for name in names)
    )


def stats_file(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}_stats.json")


def stated_size(shard: Path) -> int | None:
    """How many samples a shard's stats file says that it holds; None if there is no such file."""
    if not stats_file(shard).is_file():
        return None
    successes = read_json(stats_file(shard)).get("successes")
    return successes if isinstance(successes, int) else None


def read_shard(shard: Path, wanted: Wanted = everything) -> Iterator[Record]:
    """The records of a tar file. One that is cut short ends with a broken record that says how many are lost.

    (How many, its stats file tells; without one it counts as one sample.)
    """
    done = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for key, members in groupby(_files(tar), key=_key):
                name = f"{shard.stem}/{key}"
                if wanted(done, name):
                    yield _record(name, {_suffix(member): member for member in members}, tar)
                done += 1
        fault = None if _is_complete(shard) else "cut short"
    except (tarfile.TarError, OSError) as error:
        fault = one_line(error)
    if fault:
        lost = max(1, (stated_size(shard) or 0) - done)
        yield broken(str(shard), f"the shard cannot be read to its end ({fault})", lost)


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps them all
        if member.isfile() and not PurePosixPath(member.name).name.startswith("."):
            yield member


def _key(member: tarfile.TarInfo) -> str:
    """The name up to the first dot of its last part."""
    path = PurePosixPath(member.name)
    return str(path.parent / path.name.partition(".")[0])


def _suffix(member: tarfile.TarInfo) -> str:
    return "." + PurePosixPath(member.name).name.partition(".")[2].lower()


def _is_complete(shard: Path) -> bool:
    if not shard.is_file() or shard.stat().st_size < len(TAR_END):
        return False
    with shard.open("rb") as file:
        file.seek(-len(TAR_END), 2)
        return file.read() == TAR_END


def _record(name: str, members: Mapping[str, tarfile.TarInfo], tar: tarfile.TarFile) -> Record:
    image = next((members[suffix] for suffix in members if suffix in IMAGE_SUFFIXES), None)
    about: Any = {}
    if ".json" in members:
        try:
            about = json.loads(_read(tar, members[".json"]))
        except ValueError as error:  # of JSON or of UTF-8
            return broken(name, f"its .json is not valid ({error})")
        if not isinstance(about, dict):
            return broken(name, "its .json is no object")
    captions = about.get("captions")
    if not captions:
        has_text = ".txt" in members
        captions = _read(tar, members[".txt"]).decode("utf-8-sig", "replace") if has_text else about.get("caption")
    questions = about.get("questions") or ()
    return record_of(name, image and _read(tar, image), captions, questions)


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "only regular files come here"
    return file.read()
