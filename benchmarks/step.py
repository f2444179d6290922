"""Seconds and peak memory of a training step, every variant and both stages, as ratios to `qformer` in one run.

    python benchmarks/step.py [--rounds 12] [--output docs/results/step.md]

The embedded sizes (stage 1: batch 48, stage 2: batch 96, one thread, bf16 autocast where the CPU is fast at it). Time: the
variants take turns, step by step, so that what else the machine does hits all alike; the median is reported. Memory: each
variant trains three steps in a process of its own, whose peak resident size is read at the end.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from xformer_mllm import VARIANTS
from xformer_mllm.checkpoints import start_generation
from xformer_mllm.embedded.start import start_pretraining

BATCH = {"stage1": 48, "stage2": 96}
CAPTION = "a large red circle and two blue squares"
COMPARED = [variant for variant in VARIANTS if variant != "dinov2"]  # no tiny DINOv2 ships
QUESTION = "Question: how many blue squares are there? Answer: two"


def step_of(variant: str, stage: str):
    """A function that does one whole training step on random images."""
    model, processor = start_pretraining(variant)
    if stage == "stage2":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            model, processor = start_generation(folder)
    batch = BATCH[stage]
    inputs = {"pixel_values": torch.randint(0, 256, (batch, 3, 48, 48), dtype=torch.uint8)}
    if stage == "stage1":
        inputs |= processor(qformer_text=[CAPTION] * (batch - 1) + [f"{CAPTION} left"])
    else:
        inputs |= processor(text=[QUESTION] * batch)
        inputs["labels"] = inputs["input_ids"].clone()
        inputs["labels"][:, :-2] = -100
    model.freeze()
    model.train()
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            loss = model(**inputs).loss
        loss.backward()
        optimiser.step()

    return step


def seconds(stage: str, rounds: int) -> dict[str, float]:
    steps = {variant: step_of(variant, stage) for variant in COMPARED}
    taken: dict[str, list[float]] = {variant: [] for variant in COMPARED}
    for round_ in range(rounds + 2):
        for variant, step in steps.items():
            start = time.perf_counter()
            step()
            if round_ >= 2:
                taken[variant].append(time.perf_counter() - start)
        print(f"\r{stage}: round {round_ + 1} of {rounds + 2}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {variant: statistics.median(times) for variant, times in taken.items()}


def peak_of_this_process() -> float:
    """In MiB. Linux keeps a parent's `ru_maxrss` across exec, so there its own high-water mark is read."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2  # macOS: bytes


def peak_mebibytes(variant: str, stage: str) -> float:
    command = [sys.executable, __file__, "--memory", variant, stage]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory", nargs=2, metavar=("VARIANT", "STAGE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.memory:
        step = step_of(*arguments.memory)
        for _ in range(3):
            step()
        print(peak_of_this_process())
        return

    lines = [
        "| variant | stage 1 s/step | ratio | stage 1 MiB | ratio | stage 2 s/step | ratio | stage 2 MiB | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    time_of = {stage: seconds(stage, arguments.rounds) for stage in BATCH}
    memory_of = {stage: {variant: peak_mebibytes(variant, stage) for variant in COMPARED} for stage in BATCH}
    for variant in COMPARED:
        cells = []
        for stage in BATCH:
            for table, form in ((time_of[stage], "{:.3f}"), (memory_of[stage], "{:.0f}")):
                cells += [form.format(table[variant]), f"{table[variant] / table['qformer']:.2f}"]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    lines.append(
        f"\n`python benchmarks/step.py --rounds {arguments.rounds}`, seed 0, {platform.machine()}, one thread, "
        f"torch {torch.__version__}; stage 1 batch {BATCH['stage1']}, stage 2 batch {BATCH['stage2']}."
    )
    text = "\n".join(lines)
    print(text)
    if arguments.output:
        head = (
            "# Time and memory of a training step\n\nAt the embedded sizes; ratios to `qformer` in the same run.\n\n"
        )
        arguments.output.write_text(f"{head}{text}\n")


if __name__ == "__main__":
    main()
