"""Lanes of processes: the jobs of a lane run in order, the lanes run in parallel, one thread each.

Each job is a process that runs the command line a user would type. Two one-thread processes are faster on two cores
than one process with two threads. A finished job is skipped if its settings and code are unchanged; an interrupted job
resumes from its last checkpoint.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from xformer_mllm.files import write_whole
from xformer_mllm.processes import cores

PACKAGE = Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "xformer_mllm")

POLL_SECONDS = 0.5
SECONDS_BETWEEN_LINES = 30  # if the output is not a terminal
LINES_OF_A_FAILURE = 15
MANY_LANES = 6
ESTIMATE_AFTER = (15, 30)  # steps measured in every running lane before the first and the second estimate


@dataclass(frozen=True)
class Job:
    """One process of a lane.

    Args:
        title: shown in the status line and the report.
        folder: what the job writes.
        arguments: of the command line.
        sources: files and folders of the package whose content the result depends on.
        steps: training steps; None for a job without log.jsonl.
        work: expected duration in steps of the lane's stage 1; None if unknown.
    """

    title: str
    folder: Path
    arguments: tuple[str, ...]
    sources: tuple[str, ...]
    steps: int | None = None
    work: float | None = None

    @property
    def log(self) -> Path:
        """The file with the output of the process."""
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def marker(self) -> Path:
        """The file with the hash of what the job was made from, and its duration once it is finished."""
        return self.folder.with_name(self.folder.name + ".job.json")


class Lane:
    """The jobs of one variant, run in order."""

    def __init__(self, variant: str, jobs: Sequence[Job]):
        self.variant = variant
        self.jobs = list(jobs)
        self.seconds: dict[str, float] = {}  # title of a finished job -> its duration
        self.process: subprocess.Popen | None = None
        self._keys = job_keys(jobs)
        self._started_at = 0.0
        self._first: tuple[float, int] | None = None  # time and number of the first step seen
        self._last: tuple[float, int] | None = None  # of the last one

    @property
    def current(self) -> Job | None:
        """The job that is running or next; None if all are finished."""
        return self.jobs[len(self.seconds)] if len(self.seconds) < len(self.jobs) else None

    def skip_finished(self) -> None:
        """Skip the jobs that an earlier run finished with the same settings and code."""
        while (job := self.current) is not None and (seconds := self._finished(job)) is not None:
            self.seconds[job.title] = seconds
            print(f"{self.variant}: {job.title} already finished ({job.folder}), skipped")

    def _finished(self, job: Job) -> float | None:
        """The duration of the job if it is finished and its settings and code are unchanged, else None."""
        there = read_json(job.marker)
        return there.get("seconds") if there.get("key") == self._keys[job.title] and job.folder.is_dir() else None

    def start(self) -> None:
        """Start the current job; the same job interrupted resumes from its last checkpoint."""
        job = self.current
        assert job is not None
        key = self._keys[job.title]
        if read_json(job.marker).get("key") != key:
            _remove(job)
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        write_whole(job.marker, json.dumps({"key": key, "command": command_line(job)}, indent=2) + "\n")
        self._started_at, self._first, self._last = time.monotonic(), None, None
        with job.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {command_line(job)}\n")
            log.flush()
            self.process = subprocess.Popen(
                [*COMMAND, *job.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C reaches this process alone, which stops the whole group
            )

    def poll(self) -> None:
        """Record a job that has ended. Raises ValueError if it failed."""
        job, process = self.current, self.process
        if job is None or process is None or process.poll() is None:
            return
        self.process = None
        if process.returncode:
            print(f"\n{self.variant}, {job.title}: the last lines of {job.log}\n", file=sys.stderr)
            print("\n".join(tail(job.log, LINES_OF_A_FAILURE)), file=sys.stderr)
            raise ValueError(f"{self.variant}: {job.title} failed (exit status {process.returncode}); see {job.log}")
        seconds = time.monotonic() - self._started_at
        self.seconds[job.title] = seconds
        marker = {"key": self._keys[job.title], "command": command_line(job), "seconds": round(seconds, 1)}
        write_whole(job.marker, json.dumps(marker, indent=2) + "\n")

    def stop(self) -> None:
        """Terminate the running process and its children."""
        if self.process is None or self.process.poll() is not None:
            return
        for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
                return

    def status(self) -> str:
        """One line: job, step, losses and remaining time."""
        job = self.current
        if job is None:
            return f"{self.variant}: finished"
        place = f"{self.variant}: {job.title} ({len(self.seconds) + 1} of {len(self.jobs)})"
        if self.process is None:
            return f"{place}, waiting"
        row = last_log(job)
        if job.steps is None or "step" not in row:
            return f"{place}, {clock(time.monotonic() - self._started_at)} elapsed"
        losses = "  ".join(f"{name.removesuffix('_loss')} {row[name]:.3f}" for name in row if name.endswith("_loss"))
        return f"{place}  step {row['step']}/{job.steps}  {losses}{self._eta(job.steps, row['step'])}"

    def _eta(self, steps: int, step: int) -> str:
        measured, seconds = self._measure(step)
        return f"  ETA {clock(seconds / measured * (steps - step))}" if measured else ""

    def _measure(self, step: int) -> tuple[int, float]:
        """Steps since the first one that was seen, and the seconds they took: startup is not counted."""
        if self._last is None or step > self._last[1]:
            self._last = (time.monotonic(), step)
        self._first = self._first or self._last
        return self._last[1] - self._first[1], self._last[0] - self._first[0]

    def remaining(self, measured_steps: int) -> float | None:
        """Expected seconds to the end of the lane; None without `measured_steps` of the current job, or if unknown."""
        jobs = self.jobs[len(self.seconds) :]
        works = [job.work for job in jobs if job.work is not None]
        if self.process is None or len(works) < len(jobs) or not (steps := jobs[0].steps):
            return None
        if (step := last_log(jobs[0]).get("step")) is None:
            return None
        measured, seconds = self._measure(step)
        if measured < measured_steps:
            return None
        per_work = seconds / measured * steps / works[0]
        return per_work * (sum(works) - step / steps * works[0])


def run_lanes(lanes: Sequence[Lane]) -> None:
    """Run all lanes, as many in parallel as there are cores; after an error or a signal every process is stopped.

    Prints an estimate of the whole duration after the first steps of the running lanes, and updates it once.
    """
    for lane in lanes:
        lane.skip_finished()
    board, started_at, estimates = Board(), time.monotonic(), list(ESTIMATE_AFTER)
    with _stopping_signals():
        try:
            while any(lane.current for lane in lanes):
                for lane in lanes:
                    lane.poll()
                running = sum(lane.process is not None for lane in lanes)
                waiting = [lane for lane in lanes if lane.current and lane.process is None]
                for lane in waiting[: max(0, cores() - running)]:
                    lane.start()
                if estimates and (left := remaining(lanes, estimates[0])) is not None:
                    update = "Updated: about" if len(estimates) < len(ESTIMATE_AFTER) else "About"
                    board.print(f"{update} {minutes(time.monotonic() - started_at + left)} in all on this machine.")
                    estimates.pop(0)
                board.show(status_lines(lanes))
                time.sleep(POLL_SECONDS)
            board.show(status_lines(lanes))
        finally:
            for lane in lanes:
                lane.stop()


def status_lines(lanes: Sequence[Lane]) -> list[str]:
    """Status of every lane, or of the running ones with a count of the others if there are many."""
    if len(lanes) <= MANY_LANES:
        return [lane.status() for lane in lanes]
    finished = sum(lane.current is None for lane in lanes)
    return [f"{finished} of {len(lanes)} finished", *(lane.status() for lane in lanes if lane.process is not None)]


def remaining(lanes: Sequence[Lane], measured_steps: int) -> float | None:
    """Expected seconds until all lanes end; None if a running lane has not measured its speed.

    A lane that waits for a core counts as the mean of the running ones.
    """
    lefts = [lane.remaining(measured_steps) for lane in lanes if lane.process is not None]
    known = [left for left in lefts if left is not None]
    if not known or len(known) < len(lefts):
        return None
    waiting = sum(lane.process is None and lane.current is not None for lane in lanes)
    return max(max(known), (sum(known) + waiting * sum(known) / len(known)) / max(1, min(cores(), len(lanes))))


def minutes(seconds: float) -> str:
    """A range for an estimate made of the first steps: 600 -> '9 to 12 minutes'."""
    low, high = math.floor(0.9 * seconds / 60), math.ceil(1.15 * seconds / 60)
    return f"{low} to {high} minutes" if low else f"{high} minute{'s' * (high > 1)}"


@contextlib.contextmanager
def _stopping_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP stop the run as Ctrl-C does, unless they are ignored (`nohup`)."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    handled = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def processor() -> str:
    """The name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "processor unknown"


class Board:
    """Status lines: rewritten in place on a terminal, else printed every 30 seconds."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self._drawn = 0
        self._printed_at = float("-inf")

    def show(self, lines: Sequence[str]) -> None:
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            up = f"\x1b[{self._drawn}F" if self._drawn else ""
            print(up + "".join(f"{line[:width]}\x1b[K\n" for line in lines) + "\x1b[J", end="", flush=True)
            self._drawn = len(lines)
        elif time.monotonic() - self._printed_at >= SECONDS_BETWEEN_LINES:
            print("   ".join(lines), flush=True)
            self._printed_at = time.monotonic()

    def print(self, line: str) -> None:
        """A line that stays, above the status lines."""
        up = f"\x1b[{self._drawn}F\x1b[J" if self._drawn else ""
        print(up + line, flush=True)
        self._drawn = 0


def job_keys(jobs: Sequence[Job]) -> dict[str, str]:
    """Title -> hash of the job's command, the commands of the jobs before it, and the code and weights they use."""
    fingerprints = {sources: fingerprint(sources) for sources in {job.sources for job in jobs}}
    keys, so_far = {}, hashlib.sha256()
    for job in jobs:
        so_far.update("\0".join((*job.arguments, fingerprints[job.sources])).encode())
        if own := own_weights(job.arguments):
            so_far.update(fingerprint(own).encode())
        keys[job.title] = so_far.hexdigest()
    return keys


def own_weights(arguments: Sequence[str]) -> tuple[str, ...]:
    """Folders of weights that a command names and `xformer train encoders` or `xformer train lm` wrote."""
    folders = []
    for flag, value in pairwise(arguments):
        if flag == "--encoders":
            folders += [Path(value).absolute() / part for part in ("clip", "mae", "qformer_tokenizer")]
        elif flag == "--llm":
            folders.append(Path(value).absolute())
    return tuple(str(folder) for folder in folders if (folder / "recipe.json").is_file())


def fingerprint(sources: Sequence[str]) -> str:
    """Return a hash of the content of files and folders, given relative to the package or as absolute paths."""
    digest = hashlib.sha256()
    for source in sources:
        path = PACKAGE / source
        inside = (file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        for file in sorted(inside) if path.is_dir() else [path]:
            digest.update(os.path.relpath(file, PACKAGE).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _remove(job: Job) -> None:
    """Delete what an earlier run of the job left. Raises ValueError if the folder was not made by the demo."""
    if job.folder.exists():
        if not job.marker.is_file():
            raise ValueError(f"{job.folder}: not made by xformer demo; choose another --output-dir")
        shutil.rmtree(job.folder)
    job.log.unlink(missing_ok=True)


def command_line(job: Job) -> str:
    """The command as a user would type it."""
    return shlex.join(["xformer", *job.arguments])


def last_log(job: Job) -> dict[str, Any]:
    """The last row of the job's log.jsonl, {} if there is none."""
    rows = read_rows(job.folder / "log.jsonl")
    return rows[-1] if rows else {}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that may still be written to: an incomplete last line is skipped; [] without a file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # without the incomplete last line
    return [json.loads(line) for line in lines if line]


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log; each state of a progress bar counts as a line."""
    text = path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    return [line for line in text.splitlines() if line.strip()][-lines:]


def clock(seconds: float) -> str:
    """95.4 -> '1:35'."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole}:{rest:02d}"


def read_json(path: Path) -> Any:
    """The content of a JSON file, {} if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
