"""Crops against the published algorithm, resizing against Pillow, evaluation against the processor."""

import io
import math
import random
import statistics

import numpy as np
import pytest
import torch
from PIL import Image

from xformer_mllm.data import transforms
from xformer_mllm.data.transforms import RATIO, EvalTransform, TrainTransform, draw_crop
from xformer_mllm.model.images import load_image
from xformer_mllm.model.processing_xformer import image_processor


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blobs and noise of every size, as real images have them."""
    numbers = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells in (4, 16, 64, 256):
        noise = Image.fromarray(numbers.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=float) / math.sqrt(cells)
    return Image.fromarray((255 * (total - total.min()) / np.ptp(total)).astype(np.uint8))


def as_jpeg(image: Image.Image, **settings) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92, **settings)
    return Image.open(io.BytesIO(file.getvalue()))


def crops(width, height, scale=(0.5, 1.0), number=4000):
    rng = random.Random(0)
    return [draw_crop(width, height, scale, rng) for _ in range(number)]


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (500, 500), (1000, 300), (300, 1000), (3, 5), (1, 1)])
def test_crops_lie_in_the_image(size):
    for left, top, right, bottom in crops(*size, number=500):
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


def test_area_and_ratio_keep_their_bounds():
    for left, top, right, bottom in crops(640, 480):
        across, down = right - left, bottom - top
        rounded = 0.5 / across + 0.5 / down  # of each side to whole pixels
        assert 0.5 * (1 - 2 * rounded) <= across * down / (640 * 480) <= 1
        assert RATIO[0] * (1 - 2 * rounded) <= across / down <= RATIO[1] * (1 + 2 * rounded)


def test_crop_area_is_uniform_and_ratio_log_uniform():
    """A square and at most half of its area: sqrt(.5 * 4/3) < 1, so nothing is drawn again and the moments are known."""
    found = crops(1000, 1000, scale=(0.1, 0.5))
    areas = [(right - left) * (bottom - top) / 1e6 for left, top, right, bottom in found]
    ratios = [math.log((right - left) / (bottom - top)) for left, top, right, bottom in found]
    assert statistics.mean(areas) == pytest.approx(0.3, abs=0.006)  # about 3.3 standard errors
    assert statistics.stdev(areas) == pytest.approx(0.4 / math.sqrt(12), rel=0.03)
    assert statistics.mean(ratios) == pytest.approx(0, abs=0.009)
    assert statistics.stdev(ratios) == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), rel=0.03)
    assert np.quantile(areas, [0.25, 0.75]) == pytest.approx([0.2, 0.4], abs=0.012)


def test_place_is_uniform():
    found = crops(1000, 1000, scale=(0.1, 0.5))
    across = [left / (1000 - (right - left)) for left, _, right, _ in found]
    down = [top / (1000 - (bottom - top)) for _, top, _, bottom in found]
    for places in (across, down):
        assert statistics.mean(places) == pytest.approx(0.5, abs=0.016)
        assert statistics.stdev(places) == pytest.approx(1 / math.sqrt(12), rel=0.03)
    assert abs(statistics.correlation(across, down)) < 0.06


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 100), (433, 0, 566, 100)), ((100, 1000), (0, 433, 100, 566)), ((1, 50), (0, 24, 1, 25))],
)
def test_an_image_that_no_crop_fits_is_cropped_in_its_middle(size, expected):
    assert set(crops(*size, scale=(1.0, 1.0), number=20)) == {expected}


def test_whole_image_without_a_flip_is_pillows_resizing():
    image = photo(320, 240)
    transform = TrainTransform(96, scale=(1.0, 1.0), flip=False)

    class Whole(random.Random):  # a ratio of 4:3, so that all of the image is the crop
        def uniform(self, a, b):
            return math.log(4 / 3) if a < 0 else 1.0

    pixels = transform(image, Whole(0))
    expected = np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.02


@pytest.mark.parametrize("source", [(200, 150), (640, 480), (90, 60)])
def test_a_crop_is_pillows_crop_and_resize(source):
    image = photo(*source)
    for seed in range(5):
        pixels = TrainTransform(64, flip=False)(image, random.Random(seed))
        box = draw_crop(*source, (0.5, 1.0), random.Random(seed))
        expected = np.asarray(image.crop(box).resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
        difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.max() <= 2  # grey levels, at single pixels
        assert difference.mean() < 0.02


def test_result_is_uint8_of_the_size():
    for transform in (TrainTransform(32), EvalTransform(32)):
        pixels = transform(photo(50, 40), random.Random(0))
        assert (pixels.dtype, pixels.shape, pixels.is_contiguous()) == (torch.uint8, (3, 32, 32), True)


def test_half_are_flipped_and_none_if_not_wanted():
    image = photo(40, 40)
    flipped = 0
    for seed in range(200):
        straight = TrainTransform(16, flip=False)(image, random.Random(seed))
        pixels = TrainTransform(16)(image, random.Random(seed))
        is_flipped = not torch.equal(pixels, straight)
        assert torch.equal(pixels, straight.flip(2) if is_flipped else straight)
        flipped += is_flipped
    assert 75 <= flipped <= 125


def test_same_seed_same_pixels():
    image, transform = photo(80, 60), TrainTransform(32)
    one, again, other = (transform(image, random.Random(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_evaluation_is_what_the_processor_makes_of_it():
    for size in ((200, 150), (32, 32), (20, 50)):
        image = photo(*size)
        expected = image_processor(32)([image], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(EvalTransform(32)(image, random.Random(0)), expected)


def test_large_jpegs_are_decoded_smaller_and_look_the_same(monkeypatch):
    image = photo(1600, 1200)
    seen = []

    def load(opened):
        decoded = load_image(opened)
        seen.append(decoded.size)
        return decoded

    monkeypatch.setattr(transforms, "load_image", load)
    transform = TrainTransform(96, flip=False)
    small = transform(as_jpeg(image), random.Random(3))
    whole = transform(load_image(as_jpeg(image)), random.Random(3))
    assert seen[0] == (400, 300)  # a quarter: an eighth would be less than twice as fine as the result
    assert (small.float() - whole.float()).abs().mean() < 2


@pytest.mark.parametrize("size", [(450, 340), (255, 255)])
def test_jpegs_of_about_the_result_are_decoded_whole(size):
    opened = as_jpeg(photo(*size))
    TrainTransform(128)(opened, random.Random(0))
    assert opened.size == size


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_comes_before_the_crop(orientation):
    """The same crop, whether an image is stored upright or turned with a note of it; reduced decoding included."""
    upright = photo(1200, 900)
    stored = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turned = upright.transpose(stored[orientation]) if stored[orientation] is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    transform = TrainTransform(64, flip=False)
    found = transform(as_jpeg(turned, exif=exif), random.Random(5))
    expected = transform(upright, random.Random(5))
    assert (found.float() - expected.float()).abs().mean() < 3


@pytest.mark.parametrize(("size", "scale"), [(0, (0.5, 1)), (8, (0, 1)), (8, (0.9, 0.5)), (8, (0.5, 1.5))])
def test_impossible_settings(size, scale):
    with pytest.raises(ValueError, match="must"):
        TrainTransform(size, scale)


@pytest.mark.parametrize("name", ["image.jpg", "image.png", "image.webp"])
def test_damaged_metadata_change_no_crop(tmp_path, name):
    file, image = tmp_path / name, photo(90, 60)
    image.save(file)
    expected = TrainTransform(32)(Image.open(file), random.Random(3))
    image.save(file, exif=b"Exif\0\0garbage")
    assert torch.equal(TrainTransform(32)(Image.open(file), random.Random(3)), expected)


@pytest.mark.parametrize("name", ["image.jpg", "image.png", "image.webp"])
def test_crops_are_of_the_upright_image(tmp_path, name):
    exif, file, image = Image.Exif(), tmp_path / name, photo(90, 60)
    exif[0x0112] = 6
    image.save(file, exif=exif)
    expected = TrainTransform(32, flip=False)(load_image(file), random.Random(3))
    assert torch.equal(TrainTransform(32, flip=False)(Image.open(file), random.Random(3)), expected)
