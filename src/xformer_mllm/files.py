"""JSON files: read with an error that names the place, written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises FileNotFoundError, or ValueError with the line and column of what is wrong."""
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(_not_json(path, error.lineno, error)) from None


def read_json_lines(path: Path) -> list[Any]:
    """What a file of one JSON value a line holds; blank lines do not count. Raises as `read_json`."""
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):  # splitlines would also split within a value, at U+2028
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(_not_json(path, number, error)) from None
    return rows


def write_whole(path: Path, text: str) -> None:
    """Write `text` beside `path` first, and then put it there: the file is whole, or as it was."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text, so not JSON") from None


def _not_json(path: Path, line: int, error: json.JSONDecodeError) -> str:
    return f"{path}:{line}:{error.colno}: not valid JSON ({error.msg})"
