"""The memory that a list of images with captions takes in each process: python benchmarks/lists.py

Writes a list, with paths and captions as long as CC3M's, and opens it as training does: in the main process, and in two
workers of a data loader that read every record, in random order. Bytes a row of anonymous memory (RssAnon: what a process
has to itself, and the system cannot drop): what the main process has more than before, once opened and at the peak of
samples every 10 ms; and what each worker does not share with the main process. `resident` also counts pages of mapped
files, which all processes share and the system drops when memory is short.
"""

import argparse
import json
import random
import tempfile
import threading
import time
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader, Subset, get_worker_info

from xformer_mllm.data.sources import open_captions

WORDS = (
    "a",
    "photo",
    "of",
    "the",
    "small",
    "brown",
    "dog",
    "with",
    "two",
    "red",
    "balls",
    "on",
    "green",
    "grass",
    "in",
)
WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--format", choices=["json", "jsonl"], default="jsonl")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = write_list(Path(folder), arguments.rows, arguments.format)
        print(f"{arguments.rows:,} rows of {file.stat().st_size / arguments.rows:.0f} bytes in {file.suffix}")
        before, resident = anonymous(), anonymous("VmRSS")
        started = time.perf_counter()
        with Peak() as peak:
            dataset = open_captions(str(file), "train")
        seconds = time.perf_counter() - started
        opened, most, mapped = anonymous() - before, peak.bytes - before, anonymous("VmRSS") - resident
        print(
            f"main process  {opened / arguments.rows:6.0f}, at its peak {most / arguments.rows:6.0f}, resident "
            f"{mapped / arguments.rows:6.0f}; opened in {seconds:.0f} s",
            flush=True,
        )
        dataset.item = lambda record, epoch: len(record["captions"])  # the images do not exist
        order = random.Random(0).sample(range(len(dataset)), len(dataset))
        loader = DataLoader(Subset(dataset, order), 10_000, num_workers=WORKERS, collate_fn=memory_of_worker)
        for worker, own in sorted(dict(loader).items()):
            print(f"worker {worker}      {own / arguments.rows:6.0f}", flush=True)


def write_list(folder: Path, rows: int, form: str) -> Path:
    rng = random.Random(0)
    content = [
        {
            "image": f"cc3m/{row // 10000:05}/{row:09}.jpg",
            "caption": " ".join(rng.choices(WORDS, k=rng.randint(6, 16))),
        }
        for row in range(rows)
    ]
    (folder / "cc3m" / "00000").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / content[0]["image"])  # one of the first must exist
    file = folder / f"list.{form}"
    with file.open("w") as lines:
        if form == "json":
            json.dump(content, lines)
        else:
            lines.writelines(json.dumps(row) + "\n" for row in content)
    return file


def memory_of_worker(items: list) -> tuple[int, int]:
    info = get_worker_info()
    assert info is not None
    return info.id, private()


def private() -> int:
    """Resident bytes that this process does not share with others."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def anonymous(field: str = "RssAnon") -> int:
    """Bytes of this process, by a field of /proc/self/status."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


class Peak:
    """The most anonymous memory while it is entered, as a thread sees it."""

    def __enter__(self) -> "Peak":
        self.bytes, self._ended = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._ended.wait(0.01):
            self.bytes = max(self.bytes, anonymous())

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()


if __name__ == "__main__":
    main()
