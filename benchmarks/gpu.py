"""Training and answering at the paper's sizes on a GPU: `qformer` (BLIP-2) and `xformer` in one run, beside the paper's.

    python benchmarks/gpu.py [--stage1-batch 64] [--stage2-batch 64] [--output docs/results/gpu.md]

Random weights, bf16 autocast, OPT 2.7B; a step is a whole one, with its update. The variants run one after the other,
with torch.compile off and then on; time is the median of the steps after a warm-up, memory the most that torch had
allocated. Beside them stands what `xformer estimate` counts. Answering: one image, a prompt of 12 tokens, 10 new
tokens, greedy. `--tiny` runs the embedded world's sizes on whatever there is, to try the script out.
"""

import argparse
import gc
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from full_size import PARTS, TEXT, config_of, machine, random_inputs, random_model

from xformer_mllm.estimate.costs import Work, costs, memory, total
from xformer_mllm.estimate.sizes import sizes_of

VARIANTS = ("qformer", "xformer")
PROMPT_TOKENS = 12
NEW_TOKENS = 10
PAPER = {"training time": "1.10", "training memory": "1.047", "answer": f"{890 / 680:.2f}"}


@dataclass
class Measured:
    """Seconds of a step and of an answer, bytes allocated at most; what the estimate counts of FLOPs and bytes."""

    seconds: float
    peak: int
    flops: int
    counted: int
    answer: float | None = None


def finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median_seconds(action, device: str, warm_up: int, rounds: int) -> float:
    taken = []
    for _ in range(warm_up + rounds):
        finish(device)
        started = time.perf_counter()
        action()
        finish(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[warm_up:])


def measure(part: str, variant: str, arguments: argparse.Namespace, compiled: bool) -> Measured:
    """A training step of a stage, and behind stage 2 an answer."""
    device = arguments.device
    torch.compiler.reset()  # what was compiled for another model holds it in memory
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = config_of(part, variant, arguments.tiny)
    model = random_model(part, config, device)
    batch = arguments.stage1_batch if part == "stage1" else arguments.stage2_batch
    inputs = random_inputs(part, config, batch, device)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    if compiled:
        model.compile()

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        optimiser.step()

    seconds = median_seconds(step, device, arguments.warm_up, arguments.rounds)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    work, sizes = Work(1 if part == "stage1" else 2, batch, TEXT), sizes_of(model)
    of_image = total(list(costs(config, sizes, work).values()))
    counted = sum(memory(config, sizes, work).values())
    result = Measured(seconds, peak, batch * (of_image.forward + of_image.backward), counted)
    if part == "stage2" and not compiled:
        result.answer = answer_seconds(model, config, inputs, arguments)
    return result


def answer_seconds(model, config, inputs: dict, arguments: argparse.Namespace) -> float:
    model.eval()
    pixels = inputs["pixel_values"][:1]
    prompt = inputs["input_ids"][:1, : config.num_query_tokens + PROMPT_TOKENS]

    def answer() -> None:
        with torch.autocast(arguments.device, torch.bfloat16):
            model.generate(pixels, prompt, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False)

    return median_seconds(answer, arguments.device, arguments.warm_up, arguments.rounds)


def rows_of(results: dict[tuple[str, str, bool], Measured], arguments: argparse.Namespace) -> list[str]:
    lines = [
        "| stage | variant | torch.compile | s/step | ratio | images/s | TFLOP/s | peak GB | ratio | counted GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (part, variant, compiled), found in results.items():
        base = results[part, "qformer", compiled]
        batch = arguments.stage1_batch if part == "stage1" else arguments.stage2_batch
        cells = [
            part.removeprefix("stage"), variant, "on" if compiled else "off", f"{found.seconds:.4f}",
            f"{found.seconds / base.seconds:.3f}", f"{batch / found.seconds:.1f}",
            f"{found.flops / found.seconds / 1e12:.3f}", f"{found.peak / 1e9:.2f}" if found.peak else "–",
            f"{found.peak / base.peak:.3f}" if base.peak else "–", f"{found.counted / 1e9:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(results: dict[tuple[str, str, bool], Measured], arguments: argparse.Namespace) -> str:
    answers = [results["stage2", variant, False].answer for variant in VARIANTS]
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else machine()
    sizes = "the embedded world's sizes, to try the script out" if arguments.tiny else "the paper's sizes, OPT 2.7B"
    lines = [
        "# Time and memory on a GPU",
        "",
        f"{name}; {sizes}; random weights; bf16; {arguments.stage1_batch} images a step in stage 1, "
        f"{arguments.stage2_batch} in stage 2, texts of {TEXT} tokens. Ratios: to `qformer` (BLIP-2), same setting.",
        f"The paper: training time × {PAPER['training time']}, GPU memory × {PAPER['training memory']}.",
        "",
        *rows_of(results, arguments),
        "",
        f"Answering (one image, {PROMPT_TOKENS} tokens of prompt, {NEW_TOKENS} new ones, greedy): `qformer` "
        f"{1000 * answers[0]:.0f} ms, `xformer` {1000 * answers[1]:.0f} ms, × {answers[1] / answers[0]:.2f}; the "
        f"paper: 680 and 890 ms, × {PAPER['answer']}.",
        "",
        "TFLOP/s: the products that `xformer estimate` counts, by the measured time. Counted: its bytes, no reserve.",
        "",
        f"`python benchmarks/gpu.py {' '.join(sys.argv[1:])}`, torch {torch.__version__}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage1-batch", type=int, default=64)
    parser.add_argument("--stage2-batch", type=int, default=64)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="the embedded world's sizes, on a CPU too")
    parser.add_argument("--no-compile", action="store_true", help="leave out the half with torch.compile")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cpu" and not arguments.tiny:
        sys.exit("gpu.py: no GPU here; --tiny tries the script out on a CPU")
    results = {}
    for compiled in (False,) if arguments.no_compile else (False, True):
        for part in PARTS:
            for variant in VARIANTS:
                results[part, variant, compiled] = measure(part, variant, arguments, compiled)
                gc.collect()
                print(f"{part} {variant} compile={compiled}: {results[part, variant, compiled]}", file=sys.stderr)
    text = page(results, arguments)
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
