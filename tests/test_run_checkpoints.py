"""A run's checkpoints: written whole or not at all, looked through before use; full disks and damage on purpose."""

import errno
import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from xformer_mllm.cli import main
from xformer_mllm.train import run_folder
from xformer_mllm.train.run_folder import (
    checkpoints,
    fault,
    newest_good,
    rotate,
    step_of,
    write_files,
    written_whole,
)

FILES = {"a.safetensors": {"x": torch.arange(100.0)}, "b.json": {"step": 3}}
RUN = ["train", "stage1", "--train-size", "8", "--batch-size", "3", "--steps", "8", "--logging-steps", "4"]
RUN += ["--save-steps", "2", "--sample-steps", "8", "--warmup-steps", "2", "--variant", "qformer"]


def save(run, *steps):
    for step in steps:
        with written_whole(run / f"checkpoint-{step}") as partial:
            write_files(partial, FILES)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def cut(path, to=10):
    path.write_bytes(path.read_bytes()[:to])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a.safetensors has 10 bytes, not 472": lambda folder: cut(folder / "a.safetensors"),
    "a.safetensors is damaged": lambda folder: flip(folder / "a.safetensors"),
    "b.json has 5 bytes, not 11": lambda folder: cut(folder / "b.json", 5),
    "b.json is missing": lambda folder: (folder / "b.json").unlink(),
    "whole.json is missing": lambda folder: (folder / "whole.json").unlink(),
    "whole.json is damaged": lambda folder: cut(folder / "whole.json"),
}


def test_what_was_written_is_whole(tmp_path):
    save(tmp_path, 3, 20, 7)
    (tmp_path / "checkpoint-best").mkdir()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [20, 7, 3]
    assert newest_good(tmp_path) == (tmp_path / "checkpoint-20", [])
    assert torch.equal(load_file(tmp_path / "checkpoint-20" / "a.safetensors")["x"], torch.arange(100.0))
    assert json.loads((tmp_path / "checkpoint-20" / "b.json").read_text()) == {"step": 3}
    rotate(tmp_path, 2)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [20, 7]
    assert newest_good(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_not_used_and_it_is_said_why(tmp_path, what):
    save(tmp_path, 3, 7)
    DAMAGE[what](tmp_path / "checkpoint-7")
    good, lines = newest_good(tmp_path)
    assert good == tmp_path / "checkpoint-3"
    assert len(lines) == 1
    assert lines[0].startswith(f"{tmp_path / 'checkpoint-7'} is not used: {what}")
    assert (tmp_path / "damaged-checkpoint-7").is_dir()
    assert checkpoints(tmp_path) == [good]
    assert newest_good(tmp_path) == (good, [])


def test_without_a_good_checkpoint_a_run_does_not_restart(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "checkpoint-3" / "b.json").unlink()
    with pytest.raises(
        ValueError, match=r"b.json is missing .*; no intact checkpoint is left; --no-resume starts over"
    ):
        newest_good(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, error):
    save(tmp_path, 3)
    message = r"checkpoint-7 could not be written \(.*No space left.*\); checkpoint-3 is kept: free some"

    def write():
        with written_whole(tmp_path / "checkpoint-7") as partial:
            (partial / "a.safetensors").write_bytes(b"half")
            raise error

    with pytest.raises(OSError, match=message):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert fault(tmp_path / "checkpoint-3") is None


def test_another_error_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(KeyError), written_whole(tmp_path / "checkpoint-7"):
        raise KeyError("bug")
    assert checkpoints(tmp_path) == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert main([*RUN, "--output-dir", str(run)]) == 0
    return run


def test_a_run_stops_at_a_full_disk_and_resumes(undisturbed, tmp_path, monkeypatch, capsys):
    write = run_folder.write_files
    steps = iter(range(2, 9, 2))
    monkeypatch.setattr(run_folder, "write_files", lambda *a: full() if next(steps) == 6 else write(*a))
    assert main([*RUN, "--output-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"xformer: {tmp_path / 'checkpoint-6'} could not be written ([Errno 28] No space left")
    assert "checkpoint-4 is kept" in said
    monkeypatch.undo()

    cut(tmp_path / "checkpoint-4" / "optimizer.safetensors", 1000)
    assert main([*RUN, "--output-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'checkpoint-4'} is not used: optimizer.safetensors has 1,000 bytes, not " in said
    assert f"resuming from {tmp_path / 'checkpoint-2'}" in said
    assert (tmp_path / "log.jsonl").read_text() == (undisturbed / "log.jsonl").read_text()
    assert not list(tmp_path.glob("*checkpoint*"))


def test_a_run_that_only_lacks_its_model_takes_no_more_steps(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "save_model", full)
    assert main([*RUN, "--output-dir", str(tmp_path)]) == 2
    assert [step_of(path) for path in checkpoints(tmp_path)] == [8, 6]
    monkeypatch.undo()
    assert main([*RUN, "--output-dir", str(tmp_path)]) == 0
    assert (tmp_path / "log.jsonl").read_text() == (undisturbed / "log.jsonl").read_text()
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (undisturbed, tmp_path))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((tmp_path / "summary.json").read_text())["steps_in_this_session"] == 0


def test_leftovers_of_a_killed_run_are_deleted(undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed, tmp_path / "run")
    save(tmp_path / "run", 8)
    assert main([*RUN, "--output-dir", str(tmp_path / "run")]) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert checkpoints(tmp_path / "run") == []


def test_a_checkpoint_by_the_clock(undisturbed, tmp_path, monkeypatch):
    """With a clock that gains 20 minutes at every look: one checkpoint at every log, for 4 steps are 30 minutes or more."""
    clock = iter(range(0, 10**6, 1200))
    monkeypatch.setattr("xformer_mllm.train.loop.time.monotonic", lambda: float(next(clock)))
    kept = []
    monkeypatch.setattr("xformer_mllm.train.run_folder.rotate", lambda run, keep: kept.append(checkpoints(run)))
    command = [*RUN, "--save-steps", "1000", "--logging-steps", "1", "--save-minutes", "30"]
    assert main([*command, "--output-dir", str(tmp_path)]) == 0
    # The clock is looked at when training begins, at every step, and when a checkpoint was written.
    assert [step_of(path) for path in reversed(kept[-1])] == [2, 4, 6, 8]


def test_more_steps_of_a_finished_run_name_what_trains_further(undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    longer = [*RUN, "--steps", "12", "--output-dir"]
    assert main([*longer, str(run)]) == 2
    said = capsys.readouterr().err
    assert f"{run}: is finished after 8 steps; to train its model further, use --start-from {run}, and" in said
    assert main([*longer, str(tmp_path / "further"), "--start-from", str(run)]) == 0
    for others in (["--steps", "4"], ["--steps", "12", "--seed", "1"]):
        capsys.readouterr()
        assert main([*RUN, *others, "--output-dir", str(run)]) == 2
        assert "holds another run (" in capsys.readouterr().err


def test_more_steps_of_a_finished_stage_2(undisturbed, tmp_path, capsys):
    run = tmp_path / "2"
    stage2 = ["train", "stage2", "--train-size", "4", "--batch-size", "2", "--save-steps", "9", "--sample-steps", "9"]
    assert main([*stage2, "--steps", "1", "--from-pretraining", str(undisturbed), "--output-dir", str(run)]) == 0
    longer = [*stage2, "--steps", "2", "--from-pretraining"]
    assert main([*longer, str(undisturbed), "--output-dir", str(run)]) == 2
    assert f"use --from-pretraining {run}, and another --output-dir" in capsys.readouterr().err
    assert main([*longer, str(run), "--output-dir", str(tmp_path / "further")]) == 0


def test_flags_that_a_finished_model_excludes_are_named(undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"second_encoder": "mae", "encoders": "own"}))
    others = ["--second-encoder", "mae", "--encoders", "own"]
    assert main([*RUN, "--steps", "12", *others, "--output-dir", str(run)]) == 2
    assert f"use --start-from {run} and no --encoders and no --second-encoder, and" in capsys.readouterr().err
