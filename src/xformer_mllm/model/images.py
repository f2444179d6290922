"""Read any image as 8-bit RGB.

The processor, the data sets and the command line all read images here, so training and inference see the same pixels.
Nothing is resized.
"""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

# Below Pillow's own limit (89 million), so that Pillow never needs to decode before we refuse. 64 million pixels are
# 192 MB as RGB; both encoders look at 224 x 224.
MAX_PIXELS = 64_000_000


def load_image(source: str | os.PathLike | Image.Image) -> Image.Image:
    """Open an image and return it as 8-bit RGB.

    Animated: the first frame (of a PIL image: the current one). Transparency: composited over white. 16-bit, 32-bit
    and float greys: scaled to 8 bits, not clipped. EXIF orientation: applied. CMYK, palette, 1-bit: converted.

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
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such image; check the path")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not an image; pass the path of one image")
    try:
        with warnings.catch_warnings():
            # Pillow warns between its limit and twice it; ours is lower and an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(path)) from error
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, ... on foreign bytes
        raise ValueError(f"{path}: not a readable image ({_one_line(error)}); convert it to PNG or JPEG") from error
    with image:
        return _to_rgb(image, name=str(path))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(_too_large(name, image.size))
    if image.width * image.height == 0:
        raise ValueError(f"{name}: the image has no pixels ({image.width} x {image.height})")
    try:
        image.load()  # decodes: a truncated file fails here
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            return _deep_grey_to_8_bit(image).convert("RGB")
        if image.has_transparency_data:
            return _over_white(image)
        return image if image.mode == "RGB" else image.convert("RGB")  # each copy costs as much as decoding
    except Exception as error:  # as above: what a decoder raises depends on the format and on where the file breaks
        raise ValueError(
            f"{name}: the image is damaged or cut short ({_one_line(error)}); copy or export it again"
        ) from error


def _over_white(image: Image.Image) -> Image.Image:
    """Composite over white: transparent pixels carry arbitrary colours, often black."""
    if image.mode == "La":  # premultiplied grey does not convert to RGBA directly
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _deep_grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits to mode L; Pillow's own conversion clips at 255.

    I;16*: 0..65535. I: the same, as Pillow holds 16-bit files there too, unless a value lies outside of it: then the
    image's own range. F: 0..1, unless a value lies outside of it: then the image's own range.
    """
    pixels = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)  # float64[H, W]
    low, high = 0.0, 1.0 if image.mode.startswith("F") else 65535.0
    if pixels.min() < low or pixels.max() > high:
        low, high = pixels.min(), pixels.max()
    spread = (high - low) or 1.0  # one flat value outside of the range: black
    return Image.fromarray(np.rint((pixels - low) / spread * 255).astype(np.uint8))


def _too_large(name: str | os.PathLike, size: tuple[int, int] | None = None) -> str:
    shape = f" ({size[0]} x {size[1]})" if size else ""
    return f"{name}: the image is too large{shape}; at most {MAX_PIXELS:,} pixels, make it smaller first"


def _one_line(error: Exception) -> str:
    """Pillow's messages repeat the path, sometimes over several lines."""
    return " ".join(str(error).split())[:120] or type(error).__name__
