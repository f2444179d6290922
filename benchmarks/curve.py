"""The losses of a training run as a picture: python benchmarks/curve.py runs/stamps --output docs/results/stamps.png"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder (with its log.jsonl)")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in (arguments.run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    names = [name for name in rows[-1] if name.endswith("_loss")]
    figure, panels = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), layout="constrained")
    for panel, name in zip(panels if len(names) > 1 else [panels], names, strict=True):
        panel.plot([row["step"] for row in rows if name in row], [row[name] for row in rows if name in row])
        panel.set_title(name.removesuffix("_loss").replace("_", " "))
        panel.set_xlabel("step")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=110)
    print(arguments.output)


if __name__ == "__main__":
    main()
