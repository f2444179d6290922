"""Train a variant for a few steps of stage 1 and of stage 2 on the embedded scenes, from Python.

    python examples/train_variant.py [VARIANT] [FOLDER]

The steps are far too few to learn anything: 720 and 800 take minutes, as `make demo` does.
"""

import json
import sys
from pathlib import Path

from xformer_mllm.train.config import Stage1Config, Stage2Config
from xformer_mllm.train.stages import run_stage1, run_stage2

variant = sys.argv[1] if len(sys.argv) > 1 else "concat"
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/example")

first = run_stage1(
    Stage1Config(
        variant=variant, steps=5, batch_size=16, train_size=256, logging_steps=1, output_dir=folder / "stage1"
    )
)
second = run_stage2(
    Stage2Config(
        from_pretraining=first,
        text="questions",
        steps=5,
        batch_size=8,
        train_size=256,
        logging_steps=1,
        output_dir=folder / "stage2",
    )
)
for run in (first, second):
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    print(f"{run}: loss {losses[0]:.2f} -> {losses[-1]:.2f}")
print(f"xformer ask IMAGE QUESTION --model {second}")
