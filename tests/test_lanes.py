"""Lanes of processes against a stand-in for the command line: order, skipped jobs, failures, signals."""

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from xformer_mllm.embedded import lanes
from xformer_mllm.embedded.lanes import Job, Lane, run_lanes

# Stands in for `python -m xformer_mllm`: notes that it ran, and behaves as its first argument says.
STAND_IN = """
import json, os, pathlib, sys, time
kind, folder = sys.argv[1], pathlib.Path(sys.argv[-1])
folder.mkdir(parents=True, exist_ok=True)
with open(folder.parent / "ran", "a") as file:
    file.write(f"{folder.name} {kind} {os.environ['OMP_NUM_THREADS']}\\n")
if kind == "log":
    (folder / "log.jsonl").write_text(json.dumps({"step": 3, "loss": 5.0, "itc_loss": 2.5}) + '\\n{"step": 4, "lo')
if kind == "fail":
    print("something useful", file=sys.stderr)
    sys.exit(3)
if kind == "hang":
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)  # a lane that is not stopped ends by itself, so no test waits for ever
"""


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(lanes, "COMMAND", (sys.executable, "-c", STAND_IN))
    monkeypatch.setattr(lanes, "POLL_SECONDS", 0.02)


@pytest.fixture
def signals():
    """The handlers of an interactive shell: a background job ignores SIGINT."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


with_stand_in = pytest.mark.usefixtures("stand_in")


def job(folder: Path, kind: str = "log", title: str | None = None, steps: int | None = 10) -> Job:
    return Job(title or folder.name, folder, (kind, str(folder)), ("variants.py",), steps)


def ran(folder: Path) -> list[str]:
    return (folder / "ran").read_text().splitlines()


@with_stand_in
def test_parts_run_in_order_with_one_thread_each(tmp_path):
    both = [Lane(name, [job(tmp_path / name / "one"), job(tmp_path / name / "two")]) for name in ("a", "b")]
    run_lanes(both)
    assert ran(tmp_path / "a") == ran(tmp_path / "b") == ["one log 1", "two log 1"]
    assert all(lane.current is None and list(lane.seconds) == ["one", "two"] for lane in both)
    assert (tmp_path / "a" / "one.log").read_text().startswith("$ xformer log ")


@with_stand_in
def test_lanes_run_side_by_side_one_per_core(tmp_path, monkeypatch):
    most = []
    three = [Lane(name, [job(tmp_path / name / "one")]) for name in ("a", "b", "c")]
    monkeypatch.setattr(lanes, "cores", lambda: 2)
    monkeypatch.setattr(
        lanes.Board, "show", lambda board, lines: most.append(sum(lane.process is not None for lane in three))
    )
    run_lanes(three)
    assert max(most) == 2
    assert all(ran(tmp_path / name) == ["one log 1"] for name in ("a", "b", "c"))


@with_stand_in
def test_what_is_finished_is_not_run_again_and_says_so(tmp_path, capsys):
    def one_lane():
        return [Lane("a", [job(tmp_path / "one"), job(tmp_path / "two")])]

    run_lanes(one_lane())
    capsys.readouterr()
    again = one_lane()
    run_lanes(again)
    assert ran(tmp_path) == ["one log 1", "two log 1"]
    assert "a: one already finished" in capsys.readouterr().out
    assert set(again[0].seconds) == {"one", "two"}


@with_stand_in
def test_a_changed_configuration_reruns_what_builds_on_it(tmp_path):
    run_lanes([Lane("a", [job(tmp_path / "one"), job(tmp_path / "two")])])
    (tmp_path / "one" / "left over").write_text("from before")
    changed = replace(job(tmp_path / "one"), arguments=("log", "--steps", "5", str(tmp_path / "one")))
    run_lanes([Lane("a", [changed, job(tmp_path / "two")])])
    assert ran(tmp_path) == ["one log 1", "two log 1"] * 2
    assert not (tmp_path / "one" / "left over").exists()


@with_stand_in
def test_other_code_runs_again(tmp_path, monkeypatch):
    run_lanes([Lane("a", [job(tmp_path / "one")])])
    monkeypatch.setattr(lanes, "fingerprint", lambda sources: "changed")
    run_lanes([Lane("a", [job(tmp_path / "one")])])
    assert len(ran(tmp_path)) == 2


def test_the_fingerprint_follows_the_content_of_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(lanes, "PACKAGE", tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.py").write_text("1")
    (tmp_path / "variants.py").write_text("1")
    before = lanes.fingerprint(("model", "variants.py"))
    (tmp_path / "report.py").write_text("not a source of a result")
    assert lanes.fingerprint(("model", "variants.py")) == before
    (tmp_path / "model" / "a.py").write_text("2")
    assert lanes.fingerprint(("model", "variants.py")) != before


def test_weights_of_ones_own_belong_to_the_key(tmp_path):
    for part in ("clip", "mae", "opt"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "recipe.json").write_text("{}")
        (tmp_path / part / "model.safetensors").write_text("1")

    def key(*words):
        return lanes.job_keys([replace(job(tmp_path / "one"), arguments=("train", *words))])["one"]

    encoders, llm = ("--encoders", str(tmp_path)), ("--llm", str(tmp_path / "opt"))
    before = key(*encoders), key(*llm), key("--llm", "opt")
    (tmp_path / "mae" / "model.safetensors").write_text("2")
    now = key(*encoders), key(*llm), key("--llm", "opt")
    assert [a == b for a, b in zip(before, now, strict=True)] == [False, True, True]
    (tmp_path / "opt" / "model.safetensors").write_text("2")
    later = key(*encoders), key(*llm), key("--llm", "opt")
    assert [a == b for a, b in zip(now, later, strict=True)] == [True, False, True]


@with_stand_in
def test_an_interrupted_part_keeps_what_it_had(tmp_path):
    lane = Lane("a", [job(tmp_path / "one")])
    lane.start()
    lane.process.wait(timeout=20)
    (tmp_path / "one" / "checkpoint").write_text("precious")  # killed before it was noted as finished
    run_lanes([Lane("a", [job(tmp_path / "one")])])
    assert (tmp_path / "one" / "checkpoint").exists()
    assert len(ran(tmp_path)) == 2


@with_stand_in
def test_a_folder_that_no_demo_made_is_not_touched(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not made by xformer demo; choose another --output-dir"):
        run_lanes([Lane("a", [job(tmp_path / "one")])])
    assert (tmp_path / "one" / "thesis.txt").read_text() == "mine"


def gone(pid: int) -> bool:
    """Whether the process has ended (a child whose end nobody has noted yet has ended, too)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def pids(folder: Path) -> list[int]:
    wait_for(lambda: (folder / "pids").is_file() and len((folder / "pids").read_text().split()) == 2)
    return [int(pid) for pid in (folder / "pids").read_text().split()]


@with_stand_in
def test_a_failure_shows_its_log_and_stops_the_others(tmp_path, capsys):
    hanging, failing = (
        Lane("a", [job(tmp_path / "a" / "one", "hang")]),
        Lane("b", [job(tmp_path / "b" / "one", "fail")]),
    )
    with pytest.raises(ValueError, match=r"b: one failed \(exit status 3\).*b/one\.log"):
        run_lanes([hanging, failing])
    assert "something useful" in capsys.readouterr().err
    assert hanging.process.poll() is not None
    assert not (tmp_path / "b" / "two").exists()
    with pytest.raises(ValueError, match="exit status 3"):  # a failure is not taken for a result
        run_lanes([Lane("b", [job(tmp_path / "b" / "one", "fail")])])


@pytest.mark.usefixtures("stand_in", "signals")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_processes_and_their_children(tmp_path, signal_name):
    before = signal.getsignal(signal.SIGTERM)
    number = getattr(signal, signal_name)

    def interrupt():
        pids(tmp_path / "one")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_lanes([Lane("a", [job(tmp_path / "one", "hang")])])
    thread.join(timeout=20)
    wait_for(lambda: all(gone(pid) for pid in pids(tmp_path / "one")))
    assert signal.getsignal(signal.SIGTERM) is before


@with_stand_in
def test_the_status_tells_step_losses_and_time_left(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(lanes.time, "monotonic", lambda: now[0])
    lane = Lane("xformer", [job(tmp_path / "one", "hang", "stage 1"), job(tmp_path / "two")])
    assert lane.status() == "xformer: stage 1 (1 of 2), waiting"
    lane.start()
    try:
        (tmp_path / "one").mkdir(exist_ok=True)
        log = tmp_path / "one" / "log.jsonl"
        log.write_text('{"step": 2, "loss": 9.2, "itc_loss": 2.6, "lr": 1}\n{"step": 3, "lo')
        assert lane.status() == "xformer: stage 1 (1 of 2)  step 2/10  itc 2.600"
        log.write_text('{"step": 5, "loss": 9.1, "itc_loss": 2.5, "lr": 1}\n{"step": 6, "lo')
        now[0] += 30  # 10 seconds per step
        assert lane.status() == "xformer: stage 1 (1 of 2)  step 5/10  itc 2.500  ETA 0:50"
    finally:
        lane.stop()


@with_stand_in
def test_the_estimate_scales_measured_steps_to_later_jobs(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(lanes.time, "monotonic", lambda: now[0])
    first, later = job(tmp_path / "one", "hang"), job(tmp_path / "two")
    lane = Lane("a", [replace(first, steps=100, work=100), replace(later, work=50)])
    lane.start()
    try:
        (tmp_path / "one").mkdir(exist_ok=True)
        log = tmp_path / "one" / "log.jsonl"
        log.write_text('{"step": 10}\n')
        assert lanes.remaining([lane], 15) is None
        log.write_text('{"step": 30}\n')
        now[0] += 40  # 2 seconds per step
        assert lanes.remaining([lane], 15) == pytest.approx(2 * (70 + 50))
        assert lanes.remaining([lane], 30) is None
    finally:
        lane.stop()


def test_an_estimate_is_a_range():
    assert lanes.minutes(600) == "9 to 12 minutes"
    assert lanes.minutes(40) == "1 minute"


def test_a_log_with_progress_bars_shows_its_last_lines(tmp_path):
    (tmp_path / "log").write_text("first\n10%\r20%\r30%\nValueError: the reason\n\n")
    assert lanes.tail(tmp_path / "log", 2) == ["30%", "ValueError: the reason"]


def test_many_lanes_show_those_that_run(tmp_path):
    finished = Lane("done", [])
    waiting = [Lane(f"waiting {number}", [job(tmp_path / f"{number}")]) for number in range(lanes.MANY_LANES)]
    assert lanes.status_lines([finished, *waiting]) == ["1 of 7 finished"]
    assert lanes.status_lines([finished, waiting[0]]) == [finished.status(), waiting[0].status()]
