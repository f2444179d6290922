"""Records in a file on disk, so that a list of millions of images takes a few bytes a row of each process's memory.

The file is Arrow's, in the system's temporary folder (TMPDIR), and is mapped into memory: the system holds what is read of
it once for all processes, and drops it when memory is short. It lives as long as the process that wrote it.
"""

import os
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from xformer_mllm.data.records import Field, Record

ROWS = 4096  # in a batch of the file
READ_AT_ONCE = 256  # rows; more live objects would keep the garbage collector busy


class Table:
    """Rows in an Arrow file, in the order of `records`, which are usable ones and are read as they come.

    Its copies, also in the worker processes to which it is pickled, read the same file.
    """

    def __init__(self, records: Iterable[Record]):
        folder = tempfile.mkdtemp(prefix="xformer-")
        self._file = Path(folder) / "records.arrow"
        weakref.finalize(self, _remove, folder, os.getpid())
        self._folder_of_images: Path | None = None
        self._dropped = 0
        self.counts: dict[Field, array] = {field: array("i") for field in get_args(Field)}
        self._write(iter(records))
        self._batches = self._map()

    def _write(self, records: Iterator[Record]) -> None:
        import pyarrow  # the extra `train`

        question = pyarrow.struct(
            {"id": pyarrow.string(), "question": pyarrow.string(), "answers": pyarrow.list_(pyarrow.string())}
        )
        schema = pyarrow.schema(
            {
                "id": pyarrow.string(),
                "image": pyarrow.string(),
                "captions": pyarrow.list_(pyarrow.string()),
                "questions": pyarrow.list_(question),
            }
        )
        with pyarrow.OSFile(str(self._file), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
            while columns := self._columns(islice(records, ROWS)):
                arrays = [pyarrow.array(columns[field.name], field.type) for field in schema]
                writer.write_batch(pyarrow.RecordBatch.from_arrays(arrays, schema=schema))

    def _columns(self, records: Iterable[Record]) -> dict[str, list]:
        """Records as columns, {} if there are none; counts their texts."""
        columns: dict[str, list] = {}
        for record in records:
            for field, counts in self.counts.items():
                counts.append(len(record[field]))
            for name, value in (record | {"image": str(record["image"])}).items():
                columns.setdefault(name, []).append(value)
        return columns

    def find_images_in(self, folder: Path, dropped: int) -> None:
        """Let the images be in a folder, without the first `dropped` folders of their own paths."""
        self._folder_of_images, self._dropped = folder, dropped

    def __len__(self) -> int:
        return len(self.counts["captions"])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._located(self._batches[index // ROWS].slice(index % ROWS, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Record]:
        return self.select(range(len(self)))

    def select(self, indices: Sequence[int]) -> Iterator[Record]:
        """Yield the rows of these indices; faster than one by one where neighbours are near each other in the file."""
        for at in range(0, len(indices), READ_AT_ONCE):
            some = indices[at : at + READ_AT_ONCE]
            start = 0
            while start < len(some):
                number, end = some[start] // ROWS, start + 1
                while end < len(some) and some[end] // ROWS == number:
                    end += 1
                inside = [index % ROWS for index in some[start:end]]
                yield from map(self._located, self._batches[number].take(inside).to_pylist())
                start = end

    def ids(self) -> Iterator[str]:
        for batch in self._batches:
            yield from batch["id"].to_pylist()

    def _map(self) -> list[Any]:
        import pyarrow

        file = pyarrow.ipc.open_file(pyarrow.memory_map(str(self._file)))
        return [file.get_batch(number) for number in range(file.num_record_batches)]

    def _located(self, record: Record) -> Record:
        if self._folder_of_images is None:
            return record
        path = self._folder_of_images / Path(*Path(record["image"]).parts[self._dropped :])
        return {**record, "image": str(path)}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_batches"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._batches = self._map()


def _remove(folder: str, owner: int) -> None:
    """Remove the file, but not in a forked worker process that drops its copy of the table."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


__all__ = ["Table"]
