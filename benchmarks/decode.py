"""Decoding and transforming images, as ratios to Pillow's bare JPEG decode in the same run.

    python benchmarks/decode.py [--rounds 40] [--size 224]

JPEGs are synthetic (blobs and noise of every scale, quality 90); one thread. All variants take turns on the same images
each round, so that other load affects them equally; the median is reported. `bare` is `Image.open(...).load()` of bytes in
memory, `decoded` is `model/images.load_image` (RGB, upright, transparency, limits), `train` and `evaluation` add the
transforms, and `from shards` is a whole training item: read from a tar file, shuffled, decoded and cropped, with caption.
"""

import argparse
import io
import math
import os
import platform
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import PIL
import torch
from PIL import Image, features

from xformer_mllm.data.sources import open_captions
from xformer_mllm.data.transforms import EvalTransform, TrainTransform
from xformer_mllm.model.images import load_image

SIZES = ((640, 480), (1024, 768), (2048, 1536))
IMAGES = 8  # of each size


def jpeg(width: int, height: int, seed: int) -> bytes:
    numbers = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells in (4, 8, 16, 32, 64, 128, 256):
        noise = Image.fromarray(numbers.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=float) / math.sqrt(cells)
    file = io.BytesIO()
    pixels = 255 * (total - total.min()) / np.ptp(total)
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def shard(folder: Path, files: list[bytes]) -> str:
    """The images a hundred times over: more than the buffer holds."""
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for place in range(100 * len(files)):
            for name, content in ((f"{place:09}.jpg", files[place % len(files)]), (f"{place:09}.txt", b"an image")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(folder)


def ways(files: list[bytes], folder: Path, size: int) -> dict[str, Callable[[], object]]:
    """The compared variants; each call takes the next image."""
    rng, turns = random.Random(0), {}

    def opened(way: str) -> Image.Image:
        turns[way] = turns.get(way, -1) + 1
        return Image.open(io.BytesIO(files[turns[way] % len(files)]))

    train, evaluation = TrainTransform(size), EvalTransform(size)
    items = iter(open_captions(shard(folder, files), "train", transform=train, buffer=32))
    return {
        "bare": lambda: opened("bare").load(),
        "decoded": lambda: load_image(opened("decoded")),
        "train": lambda: train(opened("train"), rng),
        "evaluation": lambda: evaluation(opened("evaluation"), rng),
        "from shards": lambda: next(items),
    }


def seconds(compared: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of CPU time per image."""
    taken: dict[str, list[float]] = {name: [] for name in compared}
    for round_ in range(rounds + 2):
        for name, way in compared.items():
            start = time.process_time()
            for _ in range(IMAGES):
                way()
            if round_ >= 2:
                taken[name].append((time.process_time() - start) / IMAGES)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    lines = []
    for width, height in SIZES:
        print(f"{width} x {height} ...", file=sys.stderr)
        files = [jpeg(width, height, seed) for seed in range(IMAGES)]
        with tempfile.TemporaryDirectory() as folder:
            found = seconds(ways(files, Path(folder), arguments.size), arguments.rounds)
        if not lines:
            lines += [
                f"| JPEG | kB | bare, ms | {' | '.join(list(found)[1:])} | items/s per core |",
                "|---" * (len(found) + 3) + "|",
            ]
        ratios = [f"{found[name] / found['bare']:.2f}" for name in list(found)[1:]]
        kilobytes = sum(map(len, files)) / IMAGES / 1000
        cells = [f"{kilobytes:.0f}", f"{1000 * found['bare']:.2f}", *ratios, f"{1 / found['from shards']:.0f}"]
        lines.append(f"| {width} × {height} | {' | '.join(cells)} |")
    turbo = features.version_feature("libjpeg_turbo") or "no"
    lines += [
        "",
        f"`python benchmarks/decode.py --rounds {arguments.rounds} --size {arguments.size}`: medians of CPU time over "
        f"{arguments.rounds} rounds of {IMAGES} images, one thread, {platform.machine()}, Pillow {PIL.__version__} "
        f"(libjpeg-turbo {turbo}), torch {torch.__version__}. Columns from `decoded` on are ratios to `bare`.",
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
