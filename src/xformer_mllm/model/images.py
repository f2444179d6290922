"""Read any image as 8-bit RGB.

The processor, the data sets and the command line all read images here, so training and inference see the same pixels.
Nothing is resized.
"""

import io
import os
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Below Pillow's own limit (89 million), so that Pillow never needs to decode before we refuse. 64 million pixels are
# 192 MB as RGB; both encoders look at 224 x 224.
MAX_PIXELS = 64_000_000

BITS = (8, 10, 12, 14, 16)  # significant bits of an image of 16 bits
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the image upright."""
METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # in Pillow's `info`, where orientations are
OTHER_BYTE = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA", "RGBX")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
}
"""Pillow's raw modes that take the high byte of 16-bit colours, of which it has no mode -> those for the low byte."""


def load_image(source: str | os.PathLike | Image.Image) -> Image.Image:
    """Open an image and return it as 8-bit RGB.

    Animated: the first frame (of a PIL image: the current one). Transparency: composited over white. CMYK, palette,
    1-bit: converted. Orientation (EXIF, XMP): applied; damaged metadata are ignored, and leave the image as it is.

    More than 8 bits are scaled, not clipped. Files of 16 bits often hold 10, 12 or 14, and few say so. Therefore white is
    2**bits - 1 for the smallest of 8, 10, 12, 14 and 16 bits that holds the image's largest value (or for the TIFF's own
    number of bits). Of 16-bit colours all channels have the same scale. Integers outside of 0..65535, and floats outside of
    0..1, are scaled by the image's own range.

    source: path of a file, or a PIL image (left as it is).
    Raises FileNotFoundError if there is no such file, ValueError if it is not a readable image or too large, TypeError
    for any other source; messages name the file.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, name=str(getattr(source, "filename", "") or "the given image"))
    if not isinstance(source, str | os.PathLike):
        hint = "; convert an array with Image.fromarray(uint8[H, W, 3])" if hasattr(source, "shape") else ""
        raise TypeError(f"an image must be a path or a PIL image, not {type(source).__name__}{hint}")
    name = os.fspath(source)
    if str(name).startswith(("http://", "https://")):
        raise FileNotFoundError(f"{name}: URLs are not fetched; download the image and pass its path")
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not an image; pass the path of one image")
    with open_file(path, str(path)) as image:
        return _to_rgb(image, name=str(path))


def open_file(source: Path | bytes, name: str) -> Image.Image:
    """Open an image file, or its content, without decoding it; if its metadata are damaged, without them.

    name: of the image, in messages. Raises FileNotFoundError or ValueError as `load_image`.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns between its limit and twice it; ours is lower and an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            try:
                image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            except (FileNotFoundError, Image.DecompressionBombError):
                raise
            except Exception:
                bare = _without_metadata(source if isinstance(source, bytes) else source.read_bytes())
                if bare is None:
                    raise
                image = Image.open(io.BytesIO(bare))
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such image; check the path") from None
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(name)) from error
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, ... on foreign bytes
        reason = "not an image format Pillow knows" if isinstance(error, UnidentifiedImageError) else _one_line(error)
        raise ValueError(f"{name}: not a readable image ({reason}); convert it to PNG or JPEG") from error
    if not getattr(image, "filename", ""):
        image.filename = name  # for the errors of `load_image`  # type: ignore[attr-defined]
    return image


def orientation_of(image: Image.Image) -> int:
    """Return the orientation of EXIF or XMP, 1 to 8: 1 is upright, as without one that is readable.

    Decodes a PNG first.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # OSError, SyntaxError, struct.error, ...: what Pillow raises depends on the damage
        return 1
    return orientation if orientation in UPRIGHT else 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(_too_large(name, image.size))
    if image.width * image.height == 0:
        raise ValueError(f"{name}: the image has no pixels ({image.width} x {image.height})")
    try:
        image, content = _decoded(image)
        orientation = orientation_of(image)
        if image.mode.startswith(("I", "F")):
            image = _deep_grey_to_8_bit(image)
        elif content is not None:
            image = _deep_colour_to_8_bit(image, content)
        if orientation != 1:
            image = image.transpose(UPRIGHT[orientation])
            for key in METADATA:  # or the result, given to `load_image` again, would be turned again
                image.info.pop(key, None)
        if image.has_transparency_data:
            return _over_white(image)
        return image if image.mode == "RGB" else image.convert("RGB")  # each copy costs as much as decoding
    except Exception as error:  # as above: what a decoder raises depends on the format and on where the file breaks
        raise ValueError(
            f"{name}: the image is damaged or cut short ({_one_line(error)}); copy or export it again"
        ) from error


def _decoded(image: Image.Image) -> tuple[Image.Image, bytes | None]:
    """Decode an image, without its metadata if they are damaged. Also returns its file if it has 16-bit colours."""
    is_file = getattr(image, "fp", None) is not None and image.tell() == 0
    deep = is_file and _raw_mode(image) in OTHER_BYTE and "transparency" not in image.info
    content = _content(image) if deep else None
    try:
        image.load()
    except Exception:
        bare = _without_metadata(_content(image)) if is_file else None
        if bare is None:
            raise
        return _decoded(Image.open(io.BytesIO(bare)))
    return image, content


def _content(image: Image.Image) -> bytes:
    file = image.fp  # type: ignore[attr-defined]
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    return content


def _raw_mode(image: Image.Image) -> str:
    """Return the name of the decoder's pixels, "" if nothing is left to decode."""
    tiles = image.tile  # type: ignore[attr-defined]
    arguments = tiles[0].args if tiles else ""
    return str(arguments if isinstance(arguments, str) or not arguments else arguments[0])


def _without_metadata(content: bytes) -> bytes | None:
    """Return a PNG, JPEG or WebP file with what decides its pixels only; None if there is nothing else in it."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        bare = _bare_png(content)
    elif content.startswith(b"\xff\xd8"):
        bare = _bare_jpeg(content)
    elif content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        bare = _bare_webp(content)
    else:
        return None
    return bare if bare != content else None


def _bare_png(content: bytes) -> bytes:
    """Keep critical chunks, whose names begin with a capital letter, and the transparency."""
    kept, place = [content[:8]], 8
    while place + 8 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        name, end = content[place + 4 : place + 8], place + 12 + length
        if name[:1].isupper() or name == b"tRNS":
            kept.append(content[place:end])
        if name == b"IEND":
            break
        place = end
    return b"".join(kept)


def _bare_jpeg(content: bytes) -> bytes:
    """Leave out comments and APP segments, except for whole ones of JFIF and Adobe, which tell the colours."""
    kept, place = [content[:2]], 2
    while content[place : place + 1] == b"\xff" and len(content) >= place + 4:
        marker = content[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker == 0xDA:  # the pixels
            break
        (length,) = struct.unpack(">H", content[place + 2 : place + 4])
        segment = content[place : place + 2 + length]
        tells = (marker == 0xE0 and length >= 16) or (marker == 0xEE and length >= 14)
        if tells or not (marker == 0xFE or 0xE0 <= marker <= 0xEF):
            kept.append(segment)
        place += 2 + length
    return b"".join([*kept, content[place:]])


def _bare_webp(content: bytes) -> bytes:
    """Leave out the chunks of ICC, EXIF and XMP, and their flags."""
    kept, place = [], 12
    while place + 8 <= len(content):
        name = content[place : place + 4]
        (length,) = struct.unpack("<I", content[place + 4 : place + 8])
        end = place + 8 + length + length % 2
        if name == b"VP8X":
            kept.append(content[place : place + 8] + bytes([content[place + 8] & ~0x2C]) + content[place + 9 : end])
        elif name not in (b"ICCP", b"EXIF", b"XMP "):
            kept.append(content[place:end])
        place = end
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _over_white(image: Image.Image) -> Image.Image:
    """Composite over white: transparent pixels carry arbitrary colours, often black."""
    if image.mode == "La":  # premultiplied grey does not convert to RGBA directly
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _deep_grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits to mode L, as `load_image` says; Pillow's own conversion clips at 255."""
    pixels = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)  # float64[H, W]
    low, high = 0.0, 1.0 if image.mode.startswith("F") else 65535.0
    if pixels.min() < low or pixels.max() > high:
        low, high = pixels.min(), pixels.max()
    elif not image.mode.startswith("F"):
        stated = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, ())
        high = _white(pixels.max(), stated[0] if stated and stated[0] in BITS[1:-1] else None)
    spread = (high - low) or 1.0  # one flat value outside of the range: black
    return Image.fromarray(np.rint((pixels - low) / spread * 255).astype(np.uint8))


def _deep_colour_to_8_bit(image: Image.Image, content: bytes) -> Image.Image:
    """Scale 16-bit colours of which fewer than 16 bits are used. image: their high bytes, as Pillow decodes them."""
    high = np.asarray(image)  # uint8[H, W, 3 or 4]
    if _white(int(high[..., :3].max()) << 8) == 65535:
        return image
    other = Image.open(io.BytesIO(content))
    other.tile = [  # type: ignore[attr-defined]
        tile._replace(args=_other_byte(tile.args))
        for tile in other.tile  # type: ignore[attr-defined]
    ]
    pixels = high.astype(np.uint16) << 8 | np.asarray(other)
    white = [_white(pixels[..., :3].max())] * 3 + [
        _white(pixels[..., channel].max()) for channel in range(3, high.shape[2])
    ]
    return Image.fromarray(np.rint(pixels / white * 255).astype(np.uint8), image.mode)


def _other_byte(arguments: Any) -> str | tuple:
    """Return the arguments of Pillow's decoder with the raw mode for the low byte."""
    return OTHER_BYTE[arguments] if isinstance(arguments, str) else (OTHER_BYTE[arguments[0]], *arguments[1:])


def _white(largest: float, bits: int | None = None) -> int:
    """Return the largest value of the given bits, or of the smallest of `BITS` that hold `largest`."""
    return next(white for white in (2**each - 1 for each in BITS) if white >= max(largest, 2 ** (bits or 8) - 1))


def _too_large(name: str | os.PathLike, size: tuple[int, int] | None = None) -> str:
    shape = f" ({size[0]} x {size[1]})" if size else ""
    return f"{name}: the image is too large{shape}; at most {MAX_PIXELS:,} pixels, make it smaller first"


def _one_line(error: Exception) -> str:
    """Pillow's messages repeat the path, sometimes over several lines."""
    return " ".join(str(error).split())[:120] or type(error).__name__
