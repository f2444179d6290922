"""load_image: every kind of image a user may have becomes 8-bit RGB, every broken one a clear line."""

import io
import struct
import warnings
import zlib

import numpy as np
import PIL
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
        (np.array([[0, 2056, 4095]], dtype=np.int32), [0, 128, 255]),  # 12 bits in mode I
        (np.array([[-1, 0, 4095]], dtype=np.int32), [0, 0, 255]),  # outside of 16 bits: own range
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


# ---- fewer than 16 bits in a file of 16


@pytest.mark.parametrize(("largest", "bits"), [(200, 8), (255, 8), (256, 10), (1023, 10), (1024, 12), (4095, 12)])
@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_white_is_the_largest_value_of_the_bits_in_use(tmp_path, name, largest, bits):
    pixels = np.array([[0, largest // 2, largest]], dtype=np.uint16)
    expected = np.rint(pixels[0] / (2**bits - 1) * 255)
    np.testing.assert_array_equal(rgb(saved(tmp_path, Image.fromarray(pixels), name))[0, :, 2], expected)


@pytest.mark.parametrize(("largest", "bits"), [(4096, 14), (16383, 14), (16384, 16), (65535, 16)])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_bits_of_either_byte_order(largest, bits, order):
    pixels = np.array([[0, largest]], dtype=order)
    image = Image.frombytes("I;16" if order == "<u2" else "I;16B", (2, 1), pixels.tobytes())
    assert rgb(image)[0, 1, 0] == round(largest / (2**bits - 1) * 255)


def tiff(pixels, order, tags):
    """An uncompressed TIFF of one strip with these tags, all of type LONG; a list becomes SHORTs after the pixels."""
    mark, extra = "<" if order == "II" else ">", b""
    entries = b""
    for tag, value in sorted((tags | {259: 1, 273: 8, 279: len(pixels)}).items()):
        if isinstance(value, list):
            entries += struct.pack(f"{mark}HHII", tag, 3, len(value), 8 + len(pixels) + len(extra))
            extra += struct.pack(f"{mark}{len(value)}H", *value)
        else:
            entries += struct.pack(f"{mark}HHII", tag, 4, 1, value)
    head = order.encode() + struct.pack(f"{mark}HI", 42, 8 + len(pixels) + len(extra))
    return head + pixels + extra + struct.pack(f"{mark}H", len(entries) // 12) + entries + bytes(4)


def test_tiff_that_states_its_bits(tmp_path):
    path = tmp_path / "image.tif"
    packed = struct.pack(">Q", 0 << 36 | 100 << 24 | 200 << 12 | 300)[2:]
    path.write_bytes(tiff(packed, "II", {256: 4, 257: 1, 258: 12, 262: 1, 277: 1, 278: 1}))
    # Dark: the values alone would be 10 bits.
    np.testing.assert_array_equal(rgb(path)[0, :, 0], np.rint(np.array([0, 100, 200, 300]) / 4095 * 255))


def chunk(name, content, checksum=None):
    checksum = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png(pixels, colour_type, *before, after=b""):
    """A PNG of uint8 or uint16 pixels [H, W, channels] with the given chunks before and after its pixels."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, colour_type, 0, 0, 0)
    content = chunk(b"IHDR", head) + b"".join(before) + chunk(b"IDAT", zlib.compress(rows)) + after
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b"")


@pytest.mark.parametrize(("largest", "bits"), [(255, 8), (1023, 10), (4095, 12), (16383, 14)])
def test_colours_of_16_bits(tmp_path, largest, bits):
    pixels = np.random.default_rng(0).integers(0, largest + 1, (5, 7, 3)).astype(np.uint16)
    pixels[0, 0] = largest
    (tmp_path / "image.png").write_bytes(png(pixels, 2))
    np.testing.assert_array_equal(rgb(tmp_path / "image.png"), np.rint(pixels / (2**bits - 1) * 255))
    with Image.open(io.BytesIO((tmp_path / "image.png").read_bytes())) as image:
        assert np.asarray(load_image(image)).max() == 255


def test_colours_of_all_16_bits_keep_pillows_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    (tmp_path / "image.png").write_bytes(png(pixels, 2))
    np.testing.assert_array_equal(rgb(tmp_path / "image.png"), pixels >> 8)


def test_transparent_colours_of_12_bits(tmp_path):
    pixels = np.array([[[4095, 0, 0, 65535], [4095, 0, 0, 0]]], dtype=np.uint16)
    (tmp_path / "image.png").write_bytes(png(pixels, 6))
    np.testing.assert_array_equal(rgb(tmp_path / "image.png")[0], [RED, WHITE])


@pytest.mark.parametrize("order", ["II", "MM"])
def test_tiff_colours_of_12_bits(tmp_path, order):
    pixels = np.array([[[4095, 2048, 0], [16, 4095, 1]]], dtype="<u2" if order == "II" else ">u2")
    path = tmp_path / "image.tif"
    path.write_bytes(tiff(pixels.tobytes(), order, {256: 2, 257: 1, 258: [16, 16, 16], 262: 2, 277: 3, 278: 1}))
    np.testing.assert_array_equal(rgb(path), np.rint(pixels / 4095 * 255))


# ---- damaged metadata

PIXELS = np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)
DAMAGED = {
    "eXIf of rubbish": (b"eXIf", b"garbage"),
    "eXIf cut short": (b"eXIf", b"MM\0*\0\0\0\x08\0\x05"),
    "iCCP of an unknown method": (b"iCCP", b"name\0\x05abc"),
    "iCCP that is empty": (b"iCCP", b""),
    "XMP that is not UTF-8": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe"),
    "EXIF in a text, not in hexadecimals": (b"tEXt", b"Raw profile type exif\0zz\nexif\n4\nzzzz"),
    "a text of megabytes": (b"zTXt", b"name\0\0" + zlib.compress(bytes(3_000_000))),
    "gAMA that is empty": (b"gAMA", b""),
}


@pytest.mark.parametrize("checksum", [None, 1])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", DAMAGED)
def test_png_with_damaged_metadata(tmp_path, kind, after, checksum):
    extra = chunk(*DAMAGED[kind], checksum)
    path = tmp_path / "image.png"
    path.write_bytes(png(PIXELS, 2, after=extra) if after else png(PIXELS, 2, extra))
    np.testing.assert_array_equal(rgb(path), PIXELS)
    with images.open_file(path.read_bytes(), "a") as image:  # of a shard
        np.testing.assert_array_equal(rgb(image), PIXELS)


def test_a_damaged_png_stays_damaged(tmp_path):
    content = png(PIXELS, 2, chunk(b"eXIf", b"garbage"))
    (tmp_path / "image.png").write_bytes(content[:-60])
    with pytest.raises(ValueError, match=r"damaged or cut short|not a readable image") as error:
        load_image(tmp_path / "image.png")
    assert_one_line_naming(error, "image.png")


@pytest.mark.parametrize(
    ("marker", "content"),
    [
        (0xE1, b"Exif\0\0garbage"),
        (0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\x05abc"),
        (0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0"),  # the orientation is a text
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"MPF\0garbage"),
        (0xED, b"Photoshop 3.0\x008BIM\x04"),
        (0xEE, b"Adobe"),
        (0xE0, b"JFIF"),
    ],
)
def test_jpeg_with_damaged_metadata(tmp_path, marker, content):
    path = saved(tmp_path, Image.fromarray(PIXELS), "image.jpg", quality=95)
    expected, file = rgb(path), path.read_bytes()
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
    path.write_bytes(file[:2] + segment + file[2:])
    np.testing.assert_array_equal(rgb(path), expected)


def test_webp_with_damaged_metadata(tmp_path):
    image = Image.fromarray(PIXELS)
    damaged = {"exif": b"Exif\0\0garbage", "icc_profile": b"abc", "xmp": b"\xff\xfe"}
    path = saved(tmp_path, image, "image.webp", lossless=True, **damaged)
    np.testing.assert_array_equal(rgb(path), PIXELS)
    path.write_bytes(path.read_bytes()[:-5])  # within XMP, the last
    np.testing.assert_array_equal(rgb(path), PIXELS)


@pytest.mark.parametrize("tag", [274, 34675])  # orientation, ICC
@pytest.mark.parametrize(("place", "value"), [(8, b"\xff\xff\xff\x7f"), (4, b"\xff\xff\xff\x7f"), (2, b"\x63\0")])
def test_tiff_with_damaged_metadata(tmp_path, tag, place, value):
    if (tag, place) == (274, 4) and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("Pillow reads it since 13.0; before, it is an error that names the file")
    exif = Image.Exif()
    exif[274] = 1
    path = saved(tmp_path, Image.fromarray(PIXELS), "image.tif", exif=exif, icc_profile=b"abc" * 5)
    content = bytearray(path.read_bytes())
    (start,) = struct.unpack("<I", content[4:8])
    (number,) = struct.unpack("<H", content[start : start + 2])
    (entry,) = (
        at for at in range(start + 2, start + 2 + 12 * number, 12) if content[at : at + 2] == struct.pack("<H", tag)
    )
    content[entry + place : entry + place + len(value)] = value
    path.write_bytes(content)
    np.testing.assert_array_equal(rgb(path), PIXELS)


@pytest.mark.parametrize("offset", [0, 5, 2**31 - 1])
def test_tiff_whose_exif_is_elsewhere(tmp_path, offset):
    path = tmp_path / "image.tif"
    tags = {256: 9, 257: 6, 258: [8, 8, 8], 262: 2, 277: 3, 278: 6, 34665: offset}
    path.write_bytes(tiff(PIXELS.tobytes(), "II", tags))
    np.testing.assert_array_equal(rgb(path), PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["image.png", "image.jpg", "image.tif", "image.webp"])
def test_every_orientation_is_applied_once(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    path = saved(tmp_path, Image.fromarray(PIXELS), name, exif=exif)
    turned = load_image(path)
    assert turned.size == ((6, 9) if orientation > 4 else (9, 6))
    np.testing.assert_array_equal(rgb(turned), np.asarray(turned))  # not once more


@pytest.mark.parametrize("orientation", [0, 9, 700])
def test_unknown_orientations_leave_the_image_as_it_is(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    np.testing.assert_array_equal(rgb(saved(tmp_path, Image.fromarray(PIXELS), exif=exif)), PIXELS)
