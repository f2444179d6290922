"""Retrieval on images and names by others: emoji of four companies, trained on three and tested on the fourth.

    python benchmarks/emoji.py [--test facebook] [--seeds 0] [--folder runs/emoji]

`npm pack` fetches the packages (MIT; 340 MB, once): emoji-datasource-apple, -google, -twitter and -facebook have the images,
emojilib the keywords. An emoji has two captions, its name and its keywords. Stage 1 of every variant trains on three sets;
then the fourth set's drawing has to find its captions among all, and the captions their drawing. All names are known from
training, no drawing is. The tiny CLIP and MAE are trained on the same three sets first, at the sizes of the scenes.

Everything is in the folder, and what is there is not made again: packages/, images/SET/CODE.png (48x48 on white),
train.jsonl, flickr30k_test.json (the test in LAVIS's form of Flickr30k), encoders/, SEED/VARIANT/ and table.md.
"""

import argparse
import json
import random
import subprocess
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from xformer_mllm.cli import main as xformer
from xformer_mllm.embedded import encoders
from xformer_mllm.embedded.commands import ClipConfig, MaeConfig
from xformer_mllm.embedded.photographs import WORLDS
from xformer_mllm.embedded.scenes import World
from xformer_mllm.model.images import load_image

SETS = ("apple", "google", "twitter", "facebook")
VERSIONS = {f"emoji-datasource-{name}": "16.0.0" for name in SETS} | {"emojilib": "4.0.3"}
SIZE = 48
KEYWORDS = 6
VARIANTS = ("qformer", "concat", "xformer")
K_TEST = 32


def unpack(folder: Path) -> dict[str, list[str]]:
    """Write the images of all sets; return the captions of each image that all sets have: file -> [name, keywords]."""
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    files = {name: packages / f"{name}-{version}.tgz" for name, version in VERSIONS.items()}
    for name, version in VERSIONS.items():
        if not files[name].is_file():
            subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=packages, check=True)
    with tarfile.open(files["emojilib"]) as package:
        keywords = json.load(package.extractfile("package/dist/emoji-en-US.json"))
    captions: dict[str, list[str]] = {}
    for name in SETS:
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        with tarfile.open(files[f"emoji-datasource-{name}"]) as package:
            listed = json.load(package.extractfile("package/emoji.json"))
            for emoji in listed:
                character = "".join(chr(int(code, 16)) for code in emoji["unified"].split("-"))
                words = [word.replace("_", " ") for word in keywords.get(character, [])[1:]]  # the first is the name
                words = [word for word in words if any(map(str.isalpha, word))]  # no emoticons
                if character not in keywords or not all(emoji[f"has_img_{each}"] for each in SETS):
                    continue
                texts = [emoji["name"].lower(), " ".join(words[:KEYWORDS])]
                captions[emoji["image"]] = [text for text in texts if text]
                target = folder / "images" / name / emoji["image"]
                if not target.is_file():
                    with Image.open(package.extractfile(f"package/img/{name}/64/{emoji['image']}")) as image:
                        load_image(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(target)
    return captions


def write_lists(folder: Path, captions: dict[str, list[str]], test: str) -> None:
    """Write train.jsonl and flickr30k_test.json."""
    rows = [
        {"image": f"{name}/{file}", "caption": captions[file]} for name in SETS if name != test for file in captions
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tested = [{"image": f"{test}/{file}", "caption": texts} for file, texts in captions.items()]
    (folder / "flickr30k_test.json").write_text(json.dumps(tested))


@dataclass(frozen=True, slots=True)
class Shown:
    """An emoji of a training set, moved and scaled a little."""

    key: str
    number: int


def world(folder: Path) -> World:
    """The training images as a world, for the training of the encoders."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]

    @cache
    def pixels(number: int) -> Image.Image:
        return load_image(folder / "images" / rows[number]["image"])

    def draw(split: str, index: int, seed: int = 0) -> Shown:
        key = f"{seed}/{split}/{index}"
        return Shown(key, random.Random(key).randrange(len(rows)))

    def render(shown: Shown) -> np.ndarray:
        rng = random.Random(shown.key + "/render")
        size = rng.randint(40, SIZE)
        image = Image.new("RGB", (SIZE, SIZE), "white")
        image.paste(
            pixels(shown.number).resize((size, size)), (rng.randint(0, SIZE - size), rng.randint(0, SIZE - size))
        )
        return np.asarray(image)

    def caption(shown: Shown, detail: Any) -> str:
        return random.Random(shown.key + "/caption").choice(rows[shown.number]["caption"])

    def description(shown: Shown, rng: Any = None) -> str:
        """Every caption, once in some hundred calls: the tokenizer collects its words from here."""
        part = int(shown.key.rpartition("/")[2]) % 100
        return " ".join(text for row in rows[part::100] for text in row["caption"])

    return World(draw, render, caption, description, lambda *_: [], lambda *_: [], {}, SIZE, 8)


def train_encoders(folder: Path, steps: int | None) -> None:
    """Write encoders/clip, mae and qformer_tokenizer."""
    output = folder / "encoders"
    short = {} if steps is None else {"steps": steps}
    WORLDS["emoji"] = world(folder)
    if not (output / "qformer_tokenizer").is_dir():
        encoders.save_qformer_tokenizer(output, "emoji")
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:  # a new process would not know this world
        jobs = []
        if not (output / "clip").is_dir():
            jobs.append(pool.submit(encoders.train_clip, ClipConfig(**short), output, "emoji"))
        if not (output / "mae").is_dir():
            jobs.append(pool.submit(encoders.train_mae, MaeConfig(**short), output, "emoji"))
        for job in jobs:
            job.result()


def run(words: Sequence[Any]) -> None:
    if code := xformer([str(word) for word in words]):
        raise SystemExit(code)


def scores(folder: Path, variant: str, seed: int, steps: int) -> dict[str, dict[str, float]]:
    """Train stage 1 and evaluate it; return the scores of `xformer evaluate`."""
    lane = folder / str(seed) / variant
    data = ["--data", folder / "train.jsonl", "--images", folder / "images", "--augment", "none"]
    start = ["--variant", variant, "--encoders", folder / "encoders", "--seed", seed, "--steps", steps]
    run(["train", "stage1", *data, *start, "--output-dir", lane / "stage1"])
    if not (lane / "retrieval" / "metrics.json").is_file():
        asked = [
            "--benchmark",
            "flickr-retrieval",
            "--data",
            folder,
            "--images",
            folder / "images",
            "--k-test",
            K_TEST,
        ]
        run(["evaluate", lane / "stage1", *asked, "--output-dir", lane / "retrieval"])
    return json.loads((lane / "retrieval" / "metrics.json").read_text())["scores"]


def table(found: dict[str, list[dict[str, dict[str, float]]]], test: str) -> str:
    """Recalls in per cent, means over the seeds and each seed's."""
    groups = [group for group in next(iter(found.values()))[0] if group != "all"]
    lines = [f"| {test}'s drawings | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    for group in groups:
        for recall in ("recall@1", "recall@5", "recall@10"):
            cells = []
            for runs in found.values():
                values = [100 * scores[group][recall] for scores in runs]
                each = f" ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else ""
                cells.append(f"{fmean(values):.1f}{each}")
            lines.append(f"| {group}, {recall.replace('recall', 'R')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--test", choices=SETS, default="facebook")
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=1500, help="of stage 1")
    parser.add_argument("--encoder-steps", type=int, help="of CLIP and MAE; by default those of the scenes")
    options = parser.parse_args()
    folder = options.folder.resolve()
    write_lists(folder, unpack(folder), options.test)
    train_encoders(folder, options.encoder_steps)
    found = {
        variant: [scores(folder, variant, seed, options.steps) for seed in options.seeds]
        for variant in options.variants
    }
    text = table(found, options.test)
    (folder / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
