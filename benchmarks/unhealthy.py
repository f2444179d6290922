"""Runs that cannot work, beside one that can, each with a known cause.

    python benchmarks/unhealthy.py
    python benchmarks/curve.py runs/unhealthy/* --values itc_loss itm_loss itg_loss query_similarity grad_norm --output ...

Stage 1 on scenes, a minute or two each on one core. What is wrong is put in from outside, in the ways in which it happens: a
learning rate from another recipe, queries that start equal (as transformers' Q-Former leaves them, at zero), captions in
another order than the images, pixels that were not scaled to [0, 1] before CLIP's mean and deviation.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from xformer_mllm import defaults
from xformer_mllm.train import datasets, stages
from xformer_mllm.train.config import Stage1Config

start, captions = defaults.start_pretraining, datasets.captions


class OthersCaptions(Dataset):
    """Every image has the caption of the next one."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index] | {"caption": self.dataset[(index + 1) % len(self)]["caption"]}


def others_captions(config: Stage1Config, image_size: int) -> tuple[Any, Any]:
    train, held_out = captions(config, image_size)
    return OthersCaptions(train), held_out


def equal_queries(variant: str, seed: int, **others: Any) -> tuple[Any, Any]:
    model, processor = start(variant, seed, **others)
    torch.nn.init.zeros_(model.xformer.query_tokens)
    return model, processor


def unscaled_pixels(variant: str, seed: int, **others: Any) -> tuple[Any, Any]:
    model, processor = start(variant, seed, **others)
    model.config.clip_std = [deviation / 255 for deviation in model.config.clip_std]
    return model, processor


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # where the model comes from, where the data, settings
    "good": (start, captions, {}),
    "learning-rate-30-times-too-high": (start, captions, {"learning_rate": 30 * Stage1Config.learning_rate}),
    "equal-queries": (equal_queries, captions, {}),
    "captions-of-other-images": (start, others_captions, {}),
    "unscaled-pixels": (unscaled_pixels, captions, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/unhealthy"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=24)
    arguments = parser.parse_args()
    for name in arguments.cases:
        defaults.start_pretraining, datasets.captions, settings = CASES[name]
        fields = {"steps": arguments.steps, "batch_size": arguments.batch_size, "sample_steps": arguments.steps}
        config = Stage1Config(
            output_dir=arguments.output / name, logging_steps=10, warmup_steps=20, **fields, **settings
        )
        stages.run_stage1(config)


if __name__ == "__main__":
    main()
