"""load_image: every kind of image a user may have becomes 8-bit RGB, every broken one a clear line."""

import warnings

import numpy as np
import pytest
from PIL import Image

from xformer_mllm.model import images
from xformer_mllm.model.images import load_image

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def saved(tmp_path, image, name="image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def rgb(source):
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_plain_rgb_file_keeps_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(pixels))
    np.testing.assert_array_equal(rgb(path), pixels)
    np.testing.assert_array_equal(rgb(str(path)), pixels)


def test_pil_image_is_accepted_and_not_changed():
    image = Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    assert (rgb(image) == 255).all()
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (255, 0, 0, 0)


@pytest.mark.parametrize("name", ["image.gif", "image.png", "image.webp"])
def test_animated_gives_the_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert Image.open(path).n_frames == 3
    np.testing.assert_array_equal(rgb(path)[4, 4], RED)


def test_cmyk_jpeg(tmp_path):
    path = saved(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "image.jpg", quality=95)
    red, green, blue = rgb(path)[8, 8].astype(int)
    assert red > 240
    assert green < 15
    assert blue < 15


@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    path = saved(tmp_path, Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16)), name)
    np.testing.assert_array_equal(rgb(path)[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[0, 32896, 65535]], dtype=np.int32), [0, 128, 255]),  # 16 bits in mode I
        (np.array([[-100, 0, 100]], dtype=np.int32), [0, 128, 255]),  # outside of 16 bits: own range
        (np.array([[0, 1 << 20, 1 << 21]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 0.5]], dtype=np.float32), [0, 128, 128]),  # the mode's range, not the image's
        (np.array([[0.0, 127.5, 255.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[np.nan, np.inf, 1.0]], dtype=np.float32), [0, 0, 255]),
        (np.array([[-5, -5, -5]], dtype=np.int32), [0, 0, 0]),  # flat: no division by nothing
    ],
)
def test_deep_grey_in_memory(pixels, expected):
    np.testing.assert_array_equal(rgb(Image.fromarray(pixels))[0, :, 1], expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_is_laid_over_white(mode):
    base = Image.new("RGBA", (3, 1), BLACK)
    base.putalpha(Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8)))
    image = base.convert("LA").convert("La") if mode == "La" else base.convert(mode)
    assert image.mode == mode
    np.testing.assert_allclose(rgb(image)[0, :, 0].astype(int), [255, 127, 0], atol=1)


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(rgb(saved(tmp_path, image))[0], [RED, BLUE])
    np.testing.assert_array_equal(rgb(saved(tmp_path, image, transparency=0))[0], [WHITE, BLUE])


def test_rgb_with_a_transparent_colour(tmp_path):
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    np.testing.assert_array_equal(rgb(saved(tmp_path, image, transparency=RED))[0], [WHITE, BLUE])


def test_one_bit(tmp_path):
    image = Image.new("1", (2, 1), 0)
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(rgb(saved(tmp_path, image))[0], [BLACK, WHITE])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "HSV", "LAB"])
def test_one_pixel_of_every_mode(mode):
    assert rgb(Image.new(mode, (1, 1))).shape == (1, 1, 3)


def test_exif_orientation(tmp_path):
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    pixels = rgb(saved(tmp_path, image, exif=exif))
    assert pixels.shape == (2, 1, 3)
    np.testing.assert_array_equal(pixels[:, 0], [RED, BLUE])


def assert_one_line_naming(error, name):
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such image") as error:
        load_image(tmp_path / "missing.png")
    assert_one_line_naming(error, "missing.png")


def test_address_is_not_fetched():
    with pytest.raises(FileNotFoundError, match="not fetched") as error:
        load_image("https://example.org/cat.png")
    assert_one_line_naming(error, "https://example.org/cat.png")


def test_folder(tmp_path):
    with pytest.raises(ValueError, match="is a folder") as error:
        load_image(tmp_path)
    assert_one_line_naming(error, tmp_path.name)


@pytest.mark.parametrize("content", [b"", b"not an image", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_not_a_image(tmp_path, content):
    path = tmp_path / "notes.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable image") as error:
        load_image(path)
    assert_one_line_naming(error, "notes.png")


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.gif", "cut.tif", "cut.webp"])
def test_truncated_file(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(pixels), name)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"damaged or cut short|not a readable image") as error:
        load_image(path)
    assert_one_line_naming(error, name)


@pytest.mark.parametrize("pillow_limit", [1, 10**9])  # Pillow's own limit reached first, and ours reached first
def test_too_many_pixels(tmp_path, monkeypatch, pillow_limit):
    path = saved(tmp_path, Image.new("1", (40, 30)))
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    with pytest.raises(ValueError, match=r"too large.*1,000 pixels") as error:
        load_image(path)
    assert_one_line_naming(error, "image.png")


def test_no_warning_of_pillow_beside_our_error(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new("1", (40, 30)))
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="too large"):
            load_image(path)


def test_no_pixels():
    with pytest.raises(ValueError, match="no pixels"):
        load_image(Image.new("RGB", (0, 4)))


def test_other_types():
    with pytest.raises(TypeError, match="path or a PIL image, not int"):
        load_image(3)
