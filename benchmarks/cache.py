"""How much less a training step costs when the frozen encoders' features come from a cache: python benchmarks/cache.py

On scenes, with the tiny models, one thread. With and without the cache take turns, step by step, from the items of the
data set to the changed weights; the median of the processor's seconds is printed (not of the clock's, so that what else the
machine does counts little). Stage 1 with the reconstruction loss keeps CLIP's tokens alone.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from xformer_mllm import processes
from xformer_mllm.checkpoints import bf16_is_fast, start_generation
from xformer_mllm.embedded.scenes import SceneCaptions
from xformer_mllm.embedded.start import start_pretraining
from xformer_mllm.train.batches import Stage1Collator, Stage2Collator
from xformer_mllm.train.feature_cache import FeatureCache, WithFeatures

BATCH, IMAGES, WARM_UP = 24, 480, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    processes.join()
    torch.manual_seed(0)
    print("| run | s a step | from the cache | ratio | bytes an image |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, case in {
            "stage 1, `qformer`": lambda: stage1("qformer"),
            "stage 1, `xformer` (CLIP alone is kept)": lambda: stage1("xformer"),
            "stage 1, `no_reconstruction`": lambda: stage1("no_reconstruction"),
            "stage 2, `qformer`, captions": lambda: stage2("qformer"),
            "stage 2, `xformer`, captions": lambda: stage2("xformer"),
        }.items():
            before, after, size = measure(*case(), Path(folder), arguments.rounds)
            print(f"| {name} | {before:.3f} | {after:.3f} | {after / before:.2f} | {size:,} |", flush=True)


def stage1(variant: str) -> tuple[Any, Callable]:
    model, processor = start_pretraining(variant, 0)
    return model, Stage1Collator(processor, 32)


def stage2(variant: str) -> tuple[Any, Callable]:
    first, processor = start_pretraining(variant, 0)
    with tempfile.TemporaryDirectory() as folder:
        first.save_pretrained(folder)
        processor.save_pretrained(folder)
        model, processor = start_generation(folder)
    end = model.generation_config.eos_token_id
    return model, Stage2Collator(processor, end if isinstance(end, int) else end[0], 32)


def measure(model: Any, collator: Callable, folder: Path, rounds: int) -> tuple[float, float, int]:
    """Processor seconds of a step without and with the cache (medians), and the cache's bytes for an image."""
    model.freeze()
    masked = hasattr(model, "itm_head") and model.config.reconstruction
    scenes, bf16 = SceneCaptions("train", IMAGES), bf16_is_fast()
    cache = FeatureCache(folder / model.config.fusion, model, masked, "scenes", 48, bf16)
    cache.fill(model, scenes, collator)
    model.train()
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    ways = (collator, WithFeatures(collator, cache, pixels_needed=masked))
    taken: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + WARM_UP):
        items = [scenes[(round_ * BATCH + place) % IMAGES] for place in range(BATCH)]
        for way, times in zip(ways, taken, strict=True):
            began = time.process_time()
            batch = way(items)
            del batch["ids"]
            optimiser.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**batch).loss
            loss.backward()
            optimiser.step()
            times.append(time.process_time() - began)
    before, after = (statistics.median(times[WARM_UP:]) for times in taken)
    shards = list(cache.folder.glob("*.safetensors"))
    newest = max(shards, key=lambda path: path.stat().st_mtime)
    return before, after, newest.stat().st_size // IMAGES


if __name__ == "__main__":
    main()
