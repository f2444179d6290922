"""Outputs of the frozen encoders for unaugmented images, cached on disk: each image is encoded once for all epochs and runs.

    DIR/3f0c.../about.json              what the folder's name is a hash of: source, encoders' weights, sizes, precision
    DIR/3f0c.../00000000-0.safetensors  "clip" [P, layers, N, D_clip] and "mae" [P, 1+L, D_mae] of some hundred images P
    DIR/3f0c.../00000000-0.json         their ids
    DIR/3f0c.../filled-5000-clip.json   marks that all images are cached, and lists the broken ones

CLIP's tokens can always be cached, M unless patches are masked (stage 1 with the reconstruction loss masks others in each
step). Every file is written whole or not at all, and an interrupted filling resumes.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Subset

from xformer_mllm.files import read_json, write_whole
from xformer_mllm.train import freeze

SHARD, BATCH = 512, 64  # images on disk, and at a time
LISTINGS = "[0-9]*-[0-9]*.json"


def image_id(item: dict[str, Any] | list[dict[str, Any]]) -> str:
    """The image's id in an item: a caption, or the list of one image's questions."""
    return item[0]["image_id"] if isinstance(item, list) else item["id"]


class FeatureCache:
    """The features of images by their ids.

    Args:
        folder: DIR; other encoders' outputs are in other folders inside.
        model: its encoders are frozen.
        masked: whether each step masks other patches, so that M cannot be cached.
        source: name of the images' source, within which ids are unique.
        image_size: of the square that the images are resized to.
        bf16: whether the encoders run under bf16 autocast, as in training.
    """

    def __init__(self, folder: Path, model: Any, masked: bool, source: str, image_size: int, bf16: bool):
        self.about = _about(model, source, image_size, bf16)
        self.folder = folder / _hash(self.about)
        self.masked, self.bf16 = masked, bf16
        self.names = ["clip"] if masked or model.xformer.mae_encoder is None else ["clip", "mae"]
        self._places: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, Any] = {}

    # ---- reading

    def read(self, ids: list[str]) -> dict[str, torch.Tensor]:
        """{"clip": [B, layers, N, D], "mae": [B, 1+L, D]} of images. Raises ValueError for one that is not there."""
        for name in ids:
            if name not in self._places:
                raise ValueError(f"{self.folder}: has no features of {name}; delete that folder to fill it again")
        return {part: torch.stack([self._row(part, *self._places[name]) for name in ids]) for part in self.names}

    def _row(self, part: str, shard: Path, row: int) -> torch.Tensor:
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt")  # maps the file, reads only the requested row
        return self._open[shard].get_slice(part)[row]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}  # a worker process maps the files itself

    def look(self) -> None:
        """Index the cached images; shards without M count only if M is not needed."""
        self._places = {}
        for listing in sorted(self.folder.glob(LISTINGS)):
            held = read_json(listing)
            if set(self.names) <= set(held["parts"]):
                shard = listing.with_suffix(".safetensors")
                self._places |= {name: (shard, row) for row, name in enumerate(held["ids"])}

    # ---- filling

    def fill(self, model: Any, dataset: Any, collator: Callable, workers: int = 0) -> dict[str, str]:
        """Encode the images of a data set that are missing, split between processes; return the broken ones, id -> reason.

        Args:
            model: its encoders are on the device that encodes.
            dataset: whole images, of known length.
            collator: items -> a batch with pixel_values.
            workers: number of processes that load data.
        """
        process = PartialState()
        self.folder.mkdir(parents=True, exist_ok=True)
        filled = self.folder / f"filled-{len(dataset)}-{'-'.join(self.names)}.json"
        there = filled.is_file()
        self.look()
        process.wait_for_everyone()
        if not there:
            broken = self._encode(model, dataset, collator, workers)
            if process.is_main_process:
                write_whole(self.folder / "about.json", json.dumps(self.about, indent=2) + "\n")
                write_whole(filled, json.dumps({"broken": broken}, indent=2) + "\n")
            process.wait_for_everyone()
            self.look()
        return read_json(filled)["broken"]

    def _encode(self, model: Any, dataset: Any, collator: Callable, workers: int) -> dict[str, str]:
        process, started = PartialState(), time.perf_counter()
        loader = DataLoader(
            Subset(dataset, range(process.process_index, len(dataset), process.num_processes)),
            batch_size=BATCH,
            collate_fn=_Missing(collator, dataset, set(self._places)),
            num_workers=workers,
            generator=torch.Generator(),  # so that workers' seeds are not drawn from the run's random numbers
        )
        number = len(list(self.folder.glob(LISTINGS)))  # more than any of this process's
        held: dict[str, list] = {"ids": [], **{name: [] for name in self.names}}
        encoded, broken = 0, dict[str, str]()
        for ids, pixels, found_broken in loader:
            broken |= found_broken
            if ids:
                encoded += len(ids)
                held["ids"] += ids
                for name, tensor in self._features(model, pixels.to(process.device)).items():
                    held[name].append(tensor.cpu())
            if len(held["ids"]) >= SHARD:
                number = self._write(held, number)
        if held["ids"]:
            self._write(held, number)
        if encoded:
            seconds = time.perf_counter() - started
            process.print(f"{self.folder}: encoded {encoded:,} images in {seconds:.0f} s, {self._size():,} bytes each")
        return {name: why for of_one in gather_object([broken]) for name, why in of_one.items()}

    def _features(self, model: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        autocast = torch.autocast(pixels.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()
        with autocast:
            return model.xformer.frozen_features(pixels, self.masked)

    def _write(self, held: dict[str, list], number: int) -> int:
        """Write one shard, empty `held`, and return the next shard's number."""
        listing = self.folder / f"{number:08}-{PartialState().process_index}.json"
        shard, partial = listing.with_suffix(".safetensors"), listing.with_suffix(".partial")
        save_file({name: torch.cat(held[name]).contiguous() for name in self.names}, partial)
        os.replace(partial, shard)
        write_whole(listing, json.dumps({"parts": self.names, "ids": held["ids"]}))  # last: now the shard counts
        for parts in held.values():
            parts.clear()
        return number + 1

    def _size(self) -> int:
        """Bytes per image in the newest shard."""
        listing = max(self.folder.glob(LISTINGS))
        return listing.with_suffix(".safetensors").stat().st_size // len(read_json(listing)["ids"])


class WithFeatures:
    """A collator that adds "features" from a cache, and drops the pixels if they are not needed."""

    def __init__(self, collator: Callable, cache: FeatureCache, pixels_needed: bool):
        self.collator, self.cache, self.pixels_needed = collator, cache, pixels_needed

    def __call__(self, items: list) -> dict[str, Any]:
        batch = self.collator(items) | {"features": self.cache.read([image_id(item) for item in items])}
        return batch if self.pixels_needed else batch | {"pixel_values": None}


class _Missing:
    """A collator for filling: ids and pixels of images not cached yet, and the images found broken so far."""

    def __init__(self, collator: Callable, dataset: Any, there: set[str]):
        self.collator, self.there = collator, there
        self.dataset = dataset.dataset if isinstance(dataset, Subset) else dataset

    def __call__(self, items: list) -> tuple[list[str], torch.Tensor | None, dict[str, str]]:
        missing = {image_id(item): item for item in items if image_id(item) not in self.there}
        pixels = self.collator(list(missing.values()))["pixel_values"] if missing else None
        return list(missing), pixels, dict(getattr(self.dataset, "broken", {}))


def _about(model: Any, source: str, image_size: int, bf16: bool) -> dict[str, Any]:
    """Everything but the images that the features depend on."""
    config = model.config
    weights = {part.name: part.sha256 for part in freeze.freeze_table(model.xformer)}
    about: dict[str, Any] = {
        "source": source,
        "image_size": image_size,
        "transform": "the whole image, bicubic, to a square",
        "bf16_autocast": bf16,
        "clip": {
            "sha256": weights["clip_encoder"],
            "layers": model.xformer.clip_encoder.read_layers,
            "size": config.clip_config.image_size,
            "mean": list(config.clip_mean),
            "std": list(config.clip_std),
        },
    }
    if model.xformer.mae_encoder is not None:
        size, mean, std = config.mae_image_size, list(config.mae_mean), list(config.mae_std)
        about["second"] = {"sha256": weights["mae_encoder"], "size": size, "mean": mean, "std": std}
    return about


def _hash(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
