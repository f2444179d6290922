"""Atomic writing of files and folders, reading of JSON with errors that name the line, and text for messages."""

import codecs
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

READ_AHEAD = 2**20  # characters of a list
_BEFORE_ELEMENT = re.compile(r"[ \t\n\r]*[\[,][ \t\n\r]*")
_AFTER_ELEMENT = re.compile(r"[ \t\n\r]*([,\]])")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises FileNotFoundError, or ValueError with line and column of the mistake."""
    try:
        return parse_json(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(_not_json(path, error.lineno, error)) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError also for what Python cannot hold; JSONDecodeError has the place."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    except ValueError:  # Python's limit on the conversion of text
        raise ValueError(f"a number has more than {sys.get_int_max_str_digits():,} digits") from None


def is_json_list(path: Path) -> bool:
    """Whether the value of a JSON file is a list, by its first character."""
    with path.open("rb") as file:
        return file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def read_json_list(path: Path) -> Iterator[Any]:
    """Yield the elements of a JSON file whose value is a list, without holding all of it. Raises as `read_json`."""
    scan, done = json.JSONDecoder().raw_decode, 0
    text, at, ahead = "", 0, READ_AHEAD
    with contextlib.suppress(ValueError, RecursionError), path.open(encoding="utf-8-sig") as file:
        while piece := file.read(ahead):
            text, at = text[at:] + piece, 0
            ahead = max(READ_AHEAD, len(text))  # twice as much for a longer element
            while start := _BEFORE_ELEMENT.match(text, at):
                try:
                    value, end = scan(text, start.end())
                except json.JSONDecodeError:  # not all of the element is here
                    break
                after = _AFTER_ELEMENT.match(text, end)
                if after is None:  # a number may go on
                    break
                yield value
                done, at = done + 1, end
                if after[1] == "]" and not (text[after.end() :] + file.read()).strip():
                    return
    yield from read_json(path)[done:]  # raises with the place of the mistake, or the list is empty


def read_json_lines(path: Path) -> list[Any]:
    """The values of a JSON Lines file, without blank lines. Raises as `read_json`."""
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):  # splitlines would also split within a value, at U+2028
        if line.strip():
            try:
                rows.append(parse_json(line))
            except json.JSONDecodeError as error:
                raise ValueError(_not_json(path, number, error)) from None
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    return rows


def printable(text: str) -> str:
    """Replace what UTF-8 cannot encode, such as the bytes of a file name in another encoding, by its escape."""
    return text.encode(errors="backslashreplace").decode()


def first_sentence(error: Exception) -> str:
    """Return the first sentence of another library's message, which may be a page long."""
    return re.split(r"\.?(?:\n|$)|\.\s", str(error).strip(), maxsplit=1)[0][:160]


def check_new_folder(folder: Path) -> None:
    """Raise ValueError unless `folder` is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; choose another --output-dir or remove it")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A context with a temporary path, for a file or a folder, that replaces `path` at its end.

    After an error `path` is unchanged and the temporary path removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    _remove(partial)
    try:
        yield partial
        if partial.is_dir():
            _remove(path)
        os.replace(partial, path)
    except BaseException:
        _remove(partial)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text, so not JSON") from None


def _not_json(path: Path, line: int, error: json.JSONDecodeError) -> str:
    return f"{path}:{line}:{error.colno}: not valid JSON ({error.msg})"
