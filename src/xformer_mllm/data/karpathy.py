"""Karpathy & Li's splits (cs.stanford.edu/people/karpathy/deepimagesent): dataset_coco.json and dataset_flickr30k.json.

    {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "cocoid": 391895,
                 "split": "test", "sentences": [{"raw": "A man with a red helmet on a small moped.", ...}, ...]}, ...]}

COCO has the splits train (82,783 images), restval (30,504, which belong to training), val and test (5,000 each).
Flickr30k's records have neither `filepath` nor `cocoid`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xformer_mllm.files import read_json

FIELDS = {"filename": str, "split": str, "sentences": list}


@dataclass(frozen=True, slots=True)
class KarpathyImage:
    """An image of Karpathy's file. path: inside the folder of images. image_id: COCO's number, else the file's."""

    split: str
    path: str
    image_id: str
    captions: tuple[str, ...]


def is_karpathy(content: Any) -> bool:
    """Whether a JSON file's content is Karpathy's."""
    images = content.get("images") if isinstance(content, dict) else None
    return bool(images and isinstance(images, list) and isinstance(images[0], dict) and "sentences" in images[0])


def read_karpathy(file: Path, content: Any = None) -> list[KarpathyImage]:
    """The file's images, in its order. content: what `file` holds, if it is read already.

    Raises FileNotFoundError, or ValueError that names the file and the place of what is not as it should be.
    """
    content = read_json(file) if content is None else content
    if not is_karpathy(content):
        raise ValueError(f'{file}: not Karpathy\'s {{"images": [{{"filename", "split", "sentences"}}]}}')
    return [_image(image, f"{file}: images[{place}]") for place, image in enumerate(content["images"])]


def _image(image: Any, where: str) -> KarpathyImage:
    for name, kind in FIELDS.items():
        if not isinstance(image, dict) or not isinstance(image.get(name), kind):
            raise ValueError(f"{where}.{name} is missing or no {'list' if kind is list else 'text'}")
    captions = [
        text["raw"] for text in image["sentences"] if isinstance(text, dict) and isinstance(text.get("raw"), str)
    ]
    if len(captions) != len(image["sentences"]):
        raise ValueError(f'{where}.sentences: one has no text "raw"')
    folder = image.get("filepath")
    path = f"{folder}/{image['filename']}" if folder else image["filename"]
    image_id = image.get("cocoid", image.get("imgid", image["filename"]))
    return KarpathyImage(image["split"], path, str(image_id), tuple(captions))
