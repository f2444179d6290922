"""Image transforms, PIL image -> uint8[3, S, S]: one crop and one flip, seen by both encoders.

Nothing is normalised here: each encoder applies its own mean and standard deviation in the model.

Training is BLIP-2's `blip2_image_train` (LAVIS processors/blip_processors.py) and, except for the smallest area, MAE's
(main_pretrain.py): a random crop of 50-100 % of the area with an aspect ratio between 3:4 and 4:3, resized bicubically,
and a horizontal flip with probability 0.5. Evaluation is BLIP-2's `blip_image_eval`: the whole image resized to a
square, with the same pixels as `model/processing_xformer.py`.

A flipped image no longer matches a caption that says left or right. BLIP-2 flips anyway; flip=False does not.
"""

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from xformer_mllm.model.images import load_image, orientation_of

SCALE = (0.5, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10
REDUCING_GAP = 2.0  # least ratio of a reduced JPEG's side to the result's, as in Pillow's `thumbnail`
SIDEWAYS = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height
REDUCED = frozenset({"JPEG", "MPO"})  # formats that Pillow decodes at a reduced size


Transform = Callable[[Image.Image, random.Random], torch.Tensor]
"""An image as opened by `Image.open`, not yet decoded, and the source of all randomness -> uint8[3, S, S]."""


class TrainTransform:
    """A random crop, resized and randomly flipped.

    A JPEG whose crop is at least four times as wide and high as `size` is decoded at a half, a quarter or an eighth
    of its size (Pillow's draft mode), which is still at least `REDUCING_GAP` times as large as the result.

    size: side of the result, in pixels. scale: smallest and largest share of the image's area.
    """

    def __init__(self, size: int, scale: tuple[float, float] = SCALE, flip: bool = True):
        if size < 1:
            raise ValueError(f"the image size must be at least 1 pixel, not {size}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be (smallest, largest) between 0 and 1, not {scale}")
        self.size, self.scale, self.flip = size, scale, flip

    def __call__(self, image: Image.Image, rng: random.Random) -> torch.Tensor:
        if image.format not in REDUCED:
            image = load_image(image)
        sideways = orientation_of(image) in SIDEWAYS
        width, height = (image.height, image.width) if sideways else image.size
        left, top, right, bottom = draw_crop(width, height, self.scale, rng)
        factor = min(right - left, bottom - top) / (self.size * REDUCING_GAP)
        if factor >= 2:
            image.draft(None, (math.ceil(image.width / factor), math.ceil(image.height / factor)))
        image = load_image(image)
        across, down = image.width / width, image.height / height  # 1 unless decoded at a reduced size
        crop = image.crop((round(left * across), round(top * down), round(right * across), round(bottom * down)))
        # Equal to Pillow's bicubic resizing within two grey levels, and several times as fast.
        pixels = torch.nn.functional.interpolate(_tensor(crop)[None], self.size, mode="bicubic", antialias=True)[0]
        return pixels.flip(2) if self.flip and rng.random() < 0.5 else pixels


class EvalTransform:
    """The whole image, resized by Pillow as the processor does at inference."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image, rng: random.Random) -> torch.Tensor:
        return _tensor(load_image(image).resize((self.size, self.size), Image.Resampling.BICUBIC)).contiguous()


def draw_crop(width: int, height: int, scale: tuple[float, float], rng: random.Random) -> tuple[int, int, int, int]:
    """Draw left, top, right and bottom of a random crop, as torchvision's RandomResizedCrop does.

    The area is uniform in `scale` and the ratio log-uniform in `RATIO`. After ten that do not fit into the image, the
    largest centred crop whose ratio is within `RATIO` is used.
    """
    for _ in range(TRIES):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = rng.randint(0, width - across), rng.randint(0, height - down)
            return left, top, left + across, top + down
    across = min(width, max(1, round(height * RATIO[1])))
    down = min(height, max(1, round(width / RATIO[0])))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def _tensor(image: Image.Image) -> torch.Tensor:
    """RGB image -> uint8[3, H, W], channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
