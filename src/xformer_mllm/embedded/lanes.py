"""Lanes of processes: parts one after another within a lane, lanes side by side, one thread each.

Each part is a process of its own that runs the command line that a user would type. Two one-thread processes are
quicker on two cores than one process with two threads. A part that is finished is not run again for the same settings
and the same code; a part that was interrupted goes on where it was.
"""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xformer_mllm.files import write_whole

PACKAGE = Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "xformer_mllm")

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_LINES = 30  # where the output is no terminal
LINES_OF_A_FAILURE = 15


@dataclass(frozen=True)
class Part:
    """One process of a lane. `steps`: how long its log.jsonl gets, None if it writes none."""

    title: str
    folder: Path
    arguments: tuple[str, ...]
    sources: tuple[str, ...]
    steps: int | None = None

    @property
    def log(self) -> Path:
        """Where its output goes; the marker that it is finished lies beside it."""
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def marker(self) -> Path:
        return self.folder.with_name(self.folder.name + ".part.json")


class Lane:
    """One variant's parts, one after another."""

    def __init__(self, variant: str, parts: Sequence[Part]):
        self.variant = variant
        self.parts = list(parts)
        self.seconds: dict[str, float] = {}  # title of a finished part -> how long it took
        self.process: subprocess.Popen | None = None
        self._keys = part_keys(parts)
        self._began = 0.0  # when the process started
        self._first: tuple[float, int] | None = None  # when its first step was seen, and which it was

    @property
    def current(self) -> Part | None:
        """The part that is running or next; None when all are finished."""
        return self.parts[len(self.seconds)] if len(self.seconds) < len(self.parts) else None

    def skip_finished(self) -> None:
        """Pass over the parts that an earlier demo has finished with the same settings and code."""
        while (part := self.current) is not None and (seconds := self._finished(part)) is not None:
            self.seconds[part.title] = seconds
            print(f"{self.variant}: {part.title} is already there ({part.folder}), not run again")

    def _finished(self, part: Part) -> float | None:
        """How long the part took, if it is finished and made from what it would be made from now."""
        there = read_json(part.marker)
        return there.get("seconds") if there.get("key") == self._keys[part.title] and part.folder.is_dir() else None

    def start(self) -> None:
        """Start the current part: afresh, or on from its last checkpoint if it is the same part interrupted."""
        part = self.current
        assert part is not None
        key = self._keys[part.title]
        if read_json(part.marker).get("key") != key:
            _remove(part)
        part.folder.parent.mkdir(parents=True, exist_ok=True)
        write_whole(part.marker, json.dumps({"key": key, "command": command_line(part)}, indent=2) + "\n")
        self._began, self._first = time.monotonic(), None
        with part.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {command_line(part)}\n")
            log.flush()
            self.process = subprocess.Popen(
                [*COMMAND, *part.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C comes to us alone, and we stop it with all that it has started
            )

    def look(self) -> None:
        """Note a part that has ended. Raises ValueError if it failed."""
        part, process = self.current, self.process
        if part is None or process is None or process.poll() is None:
            return
        self.process = None
        if process.returncode:
            print(f"\n{self.variant}, {part.title}: the last lines of {part.log}\n", file=sys.stderr)
            print("\n".join(tail(part.log, LINES_OF_A_FAILURE)), file=sys.stderr)
            raise ValueError(
                f"{self.variant}: {part.title} failed (exit status {process.returncode}); all it said is in {part.log}"
            )
        seconds = time.monotonic() - self._began
        self.seconds[part.title] = seconds
        marker = {"key": self._keys[part.title], "command": command_line(part), "seconds": round(seconds, 1)}
        write_whole(part.marker, json.dumps(marker, indent=2) + "\n")

    def stop(self) -> None:
        """End the running process and everything that it has started."""
        if self.process is None or self.process.poll() is not None:
            return
        for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
                return

    def status(self) -> str:
        """One line: where this lane is."""
        part = self.current
        if part is None:
            return f"{self.variant}: finished"
        place = f"{self.variant}: {part.title} ({len(self.seconds) + 1} of {len(self.parts)})"
        if self.process is None:
            return f"{place}, waiting"
        row = last_log(part)
        if part.steps is None or "step" not in row:
            return f"{place}, {clock(time.monotonic() - self._began)} so far"
        losses = "  ".join(f"{name.removesuffix('_loss')} {row[name]:.3f}" for name in row if name.endswith("_loss"))
        return f"{place}  step {row['step']}/{part.steps}  {losses}{self._left(part.steps, row['step'])}"

    def _left(self, steps: int, step: int) -> str:
        """How long the part will still take, by the steps since the first that was seen: starting up is not counted."""
        now = time.monotonic()
        first_seen, first_step = self._first = self._first or (now, step)
        if step <= first_step:
            return ""
        return f"  {clock((now - first_seen) / (step - first_step) * (steps - step))} left"


def run_lanes(lanes: Sequence[Lane]) -> None:
    """Run every lane to its end, as many at once as there are cores. Whatever happens, no process is left behind."""
    for lane in lanes:
        lane.skip_finished()
    board = Board()
    with _stopping_signals():
        try:
            while any(lane.current for lane in lanes):
                for lane in lanes:
                    lane.look()
                running = sum(lane.process is not None for lane in lanes)
                waiting = [lane for lane in lanes if lane.current and lane.process is None]
                for lane in waiting[: max(0, cores() - running)]:
                    lane.start()
                board.show([lane.status() for lane in lanes])
                time.sleep(SECONDS_BETWEEN_LOOKS)
            board.show([lane.status() for lane in lanes])
        finally:
            for lane in lanes:
                lane.stop()


@contextlib.contextmanager
def _stopping_signals() -> Iterator[None]:
    """`kill` and a closed terminal stop us as Ctrl-C does, so that the processes are stopped too."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Board:
    """Status lines: rewritten in place on a terminal, else printed now and then."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self._drawn = 0
        self._printed_at = float("-inf")

    def show(self, lines: Sequence[str]) -> None:
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            up = f"\x1b[{self._drawn}F" if self._drawn else ""
            print(up + "".join(f"{line[:width]}\x1b[K\n" for line in lines), end="", flush=True)
            self._drawn = len(lines)
        elif time.monotonic() - self._printed_at >= SECONDS_BETWEEN_LINES:
            print("   ".join(lines), flush=True)
            self._printed_at = time.monotonic()


def part_keys(parts: Sequence[Part]) -> dict[str, str]:
    """A hash for each part of what it is made from: its command, those of the parts before it, code and weights."""
    fingerprints = {sources: _fingerprint(sources) for sources in {part.sources for part in parts}}
    keys, so_far = {}, hashlib.sha256()
    for part in parts:
        so_far.update("\0".join((*part.arguments, fingerprints[part.sources])).encode())
        keys[part.title] = so_far.hexdigest()
    return keys


def _fingerprint(sources: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        path = PACKAGE / source
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(PACKAGE)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _remove(part: Part) -> None:
    """Make room for a part: delete what an earlier demo left in its place.

    Raises ValueError if something is there that no demo has made.
    """
    if part.folder.exists():
        if not part.marker.is_file():
            raise ValueError(f"{part.folder}: not made by xformer demo; choose another --output-dir")
        shutil.rmtree(part.folder)
    part.log.unlink(missing_ok=True)


def command_line(part: Part) -> str:
    """What a user would type."""
    return shlex.join(["xformer", *part.arguments])


def last_log(part: Part) -> dict[str, Any]:
    """The newest row of the part's log.jsonl, {} if there is none."""
    rows = read_rows(part.folder / "log.jsonl")
    return rows[-1] if rows else {}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that may still be written to: a last line cut short is left out; [] without a file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line end is not complete
    return [json.loads(line) for line in lines if line]


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log; each state of a progress bar that rewrites itself counts as one."""
    text = path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    return [line for line in text.splitlines() if line.strip()][-lines:]


def clock(seconds: float) -> str:
    """95.4 -> '1:35'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def read_json(path: Path) -> Any:
    """{} if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
