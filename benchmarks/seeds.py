"""The demo with several seeds, as one table: mean over the seeds, and lowest to highest. Writes a page of docs/results.

    python benchmarks/seeds.py --title "Scenes" --output docs/results/scenes.md --seeds 0 1 2 -- --variants qformer xformer

Everything behind `--` goes to `xformer demo`. Each seed is a demo of its own in runs/seeds/NAME/SEED, NAME being that of the
output file (seed 0 without arguments is `make demo`'s, in runs/demo); finished parts are not run again. The seed decides the
initial weights, the batches, the masks and the negatives; the encoders, the language model and the test questions are the
same for all.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import transformers


def folder_of(seed: int, name: str, arguments: list[str]) -> Path:
    """`make demo`'s own folder where the run is `make demo`."""
    return Path("runs/demo") if seed == 0 and not arguments else Path("runs/seeds") / name / str(seed)


def run(seed: int, folder: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "xformer_mllm", "demo", "--seed", str(seed), "--output-dir", str(folder)]
    subprocess.run([*command, *arguments], check=True)


def table(scores: list[dict]) -> str:
    """A row for each type of question; `scores`: metrics.json of each seed."""
    variants = list(scores[0])
    groups = list(scores[0][variants[0]])
    blind = [name for name in ("majority", "question_only") if name in scores[0][variants[0]]["all"]]
    lines = [
        f"| question type | n | {' | '.join([*blind, *variants])} |",
        "|---|" + "---|" * (1 + len(blind + variants)),
    ]
    for group in groups:
        first = scores[0][variants[0]][group]
        cells = [f"{first[name]:.3f}" for name in blind]
        for variant in variants:
            found = [score[variant][group]["accuracy"] for score in scores]
            spread = f" ({min(found):.3f}–{max(found):.3f})" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.3f}{spread}")
        lines.append(f"| {group.replace('_', ' ')} | {first['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def minutes(folder: Path) -> float:
    """How long the slowest variant's parts took, one after another."""
    lanes: dict[str, float] = {}
    for marker in folder.glob("*/*.part.json"):
        part = json.loads(marker.read_text())
        lanes[marker.parent.name] = lanes.get(marker.parent.name, 0.0) + part["seconds"]
    return max(lanes.values()) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--title", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("demo", nargs="*", help="arguments of xformer demo")
    arguments = parser.parse_args()
    folders = [folder_of(seed, arguments.output.stem, arguments.demo) for seed in arguments.seeds]
    for seed, folder in zip(arguments.seeds, folders, strict=True):
        run(seed, folder, arguments.demo)
    pages = [f"# {arguments.title}\n"]
    for name, heading in (
        ("metrics.json", "Stage 2 with questions and answers"),
        ("metrics_zero_shot.json", "Stage 2 on captions only: zero-shot questions, the paper's setting"),
    ):
        scores = [json.loads((folder / name).read_text()) for folder in folders if (folder / name).exists()]
        if scores:
            pages.append(f"## {heading}\n\n{table(scores)}\n")
    made_by = [
        "python",
        "benchmarks/seeds.py",
        "--title",
        arguments.title,
        "--output",
        str(arguments.output),
        "--seeds",
    ]
    made_by += [*map(str, arguments.seeds), "--", *arguments.demo]
    pages.append(
        "Accuracy: mean over the seeds (lowest–highest). `majority`: the most frequent training answer to the question "
        "type; `question_only`: to the exact question.\n\n"
        f"Made by `{shlex.join(made_by)}`. The slowest variant of the slowest seed took "
        f"{max(map(minutes, folders)):.1f} minutes: x86_64, 2 CPU cores, one thread for each variant, "
        f"torch {torch.__version__}, transformers {transformers.__version__}.\n"
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join(pages))
    print(arguments.output)


if __name__ == "__main__":
    main()
