"""kill -9 a training again and again, also while it writes a checkpoint, and see that nothing is lost.

    python benchmarks/kill.py

Trains stage 1 once undisturbed, and once with `--kills` kills: every other one at a random moment of up to two intervals
from its start, the others at a random moment of a checkpoint's writing. Each time the same command is given again. It must
go on from the newest checkpoint, which must be no more than one interval behind what it had logged, and at the end have
the losses, the held-out texts and the weights of the undisturbed run, bit for bit. Ends with exit code 1 where it does not.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.numpy import load_file

from xformer_mllm.train.run_folder import checkpoints, step_of

GOES_ON = re.compile(r"resuming from .*checkpoint-(\d+)")
LOOK = 0.002  # seconds between two looks
A_STEP, A_WRITING = 0.1, 0.03  # seconds, about: the kill comes within


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/kill"), help="a folder for both runs")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--save-steps", type=int, default=4, help="the interval, in steps")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    steps = 2 * arguments.save_steps * arguments.kills  # more than the killed sessions can do between them
    command = [sys.executable, "-m", "xformer_mllm", "train", "stage1", "--variant", "qformer"]
    command += ["--train-size", "32", "--batch-size", str(arguments.batch_size), "--steps", str(steps)]
    command += ["--logging-steps", "1", "--save-steps", str(arguments.save_steps), "--sample-steps", str(steps)]

    undisturbed, killed = arguments.output / "undisturbed", arguments.output / "killed"
    subprocess.run([*command, "--no-resume", "--output-dir", str(undisturbed)], check=True, stdout=subprocess.DEVNULL)
    print(f"undisturbed: {steps} steps, a checkpoint every {arguments.save_steps}")
    rng, failures = random.Random(arguments.seed), []
    started = ["--no-resume"]
    for number in range(arguments.kills):
        while_writing = number % 2 == 1
        after = None if while_writing else rng.randint(1, 2 * arguments.save_steps)
        found = kill_once([*command, *started, "--output-dir", str(killed)], killed, rng, after)
        started = []
        print(f"kill {number + 1:>2}, {describe(found)}", flush=True)
        failures += [f"kill {number + 1}: {what}" for what in wrong(found, arguments.save_steps)]
    last = subprocess.run([*command, "--output-dir", str(killed)], check=True, text=True, capture_output=True).stdout
    print(f"then to the end, from checkpoint-{resumed_at(last)}")
    failures += differences(undisturbed, killed)
    print("\n".join(failures) or f"{arguments.kills} kills: always resumed, never lost more than {arguments.save_steps} "
          "steps, and ended with the losses, texts and weights of the undisturbed run, bit for bit")  # fmt: skip
    sys.exit(1 if failures else 0)


def kill_once(command: list[str], run: Path, rng: random.Random, after: int | None) -> dict:
    """Start, kill `after` so many steps (None: while it writes its next checkpoint), and say what was found."""
    before, began = 0 if "--no-resume" in command else newest(run), time.time()
    out = run.with_suffix(".out")
    with out.open("w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    # A line of progress means that the session has begun, and cut log.jsonl back to its checkpoint.
    wait_until(process, lambda: "images/s" in out.read_text())
    if after is None:
        wait_until(process, lambda: half_written(run, began))
        time.sleep(rng.uniform(0, A_WRITING))
    else:
        wait_until(process, lambda: logged(run) >= before + after)
        time.sleep(rng.uniform(0, A_STEP))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return {
        "resumed_at": resumed_at(out.read_text()),
        "before": before,
        "logged": logged(run),
        "newest": newest(run),
        "half_written": half_written(run, began),
    }


def wait_until(process: subprocess.Popen, reached) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the training ended by itself (exit code {process.poll()}) before it was killed")
        time.sleep(LOOK)


def half_written(run: Path, began: float) -> bool:
    """Whether there is a half-written checkpoint of the session that began then (an earlier one's may lie there, too)."""
    try:
        return any(path.stat().st_mtime > began for path in run.glob("checkpoint-*.partial"))
    except FileNotFoundError:  # just made whole
        return False


def newest(run: Path) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    return next((step_of(checkpoint) for checkpoint in checkpoints(run)), 0)


def logged(run: Path) -> int:
    """The last step of which the whole line stands in log.jsonl."""
    lines = (run / "log.jsonl").read_text().split("\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def resumed_at(output: str) -> int:
    found = GOES_ON.search(output)
    return int(found.group(1)) if found else 0


def describe(found: dict) -> str:
    where = "in a half-written checkpoint" if found["half_written"] else "elsewhere"
    return (
        f"begun at step {found['resumed_at']:>3}, killed {where:<28} after step {found['logged']:>3}; "
        f"checkpoint-{found['newest']} is there: {found['logged'] - found['newest']} steps lost"
    )


def wrong(found: dict, interval: int) -> list[str]:
    problems = []
    if found["resumed_at"] != found["before"]:
        problems.append(f"went on from {found['resumed_at']}, not from the newest checkpoint, {found['before']}")
    if found["logged"] - found["newest"] > interval:
        problems.append(f"lost {found['logged'] - found['newest']} steps")
    return problems


def differences(one: Path, other: Path) -> list[str]:
    found = [
        f"{name} is not that of the undisturbed run"
        for name in ("log.jsonl", "samples.jsonl")
        if (one / name).read_text() != (other / name).read_text()
    ]
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    if ours.keys() != theirs.keys() or any((ours[name] != theirs[name]).any() for name in ours):
        found.append("the weights are not those of the undisturbed run")
    return found


if __name__ == "__main__":
    main()
