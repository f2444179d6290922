"""The log of one or several training runs as an image.

python benchmarks/curve.py runs/stamps --output docs/results/stamps.png
python benchmarks/curve.py runs/unhealthy/* --values itc_loss query_similarity --output docs/results/unhealthy.png
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

OVER_DECADES = ("grad_norm",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="runs' folders (with their log.jsonl)")
    parser.add_argument(
        "--values", nargs="+", help="which of the log's values; by default every loss of the first run"
    )
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    logs = {run.name: read(run) for run in arguments.runs}
    names = arguments.values or [name for name in next(iter(logs.values()))[-1] if name.endswith("_loss")]
    figure, panels = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), layout="constrained", squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for run, rows in logs.items():
            steps = [row["step"] for row in rows if name in row]
            panel.plot(steps, [row[name] for row in rows if name in row], label=run.replace("-", " "))
        panel.set_title(name.removesuffix("_loss").replace("_", " "))
        panel.set_xlabel("step")
        panel.set_yscale("log" if name in OVER_DECADES else "linear")
    if len(logs) > 1:
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(logs))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=110)
    print(arguments.output)


def read(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
