"""Karpathy's splits of COCO and Flickr30k, from either of two files.

- dataset_coco.json or dataset_flickr30k.json, Karpathy's own (cs.stanford.edu/people/karpathy/deepimagesent):
  {"images": [{"filepath", "filename", "cocoid", "split", "sentences": [{"raw"}]}]} for all splits.
- coco_karpathy_test.json or flickr30k_test.json, of BLIP and LAVIS: [{"image": "val2014/COCO_val2014_....jpg",
  "caption": [...]}] for one split. LAVIS's training files have one caption per row, and are refused.
"""

import re
from pathlib import Path
from typing import Any

from xformer_mllm.data.formats import KarpathyImage, read_karpathy
from xformer_mllm.evaluate.benchmark import field
from xformer_mllm.files import read_json

IMAGE_NUMBER = re.compile(r"[0-9]{1,18}")  # fits an int64


def read_split(data: Path, split: str, karpathy_name: str, lavis_name: str) -> tuple[Path, list[KarpathyImage]]:
    """Read the images of a split, and return them with the file; Karpathy's is preferred.

    Raises FileNotFoundError without either file; ValueError if it is invalid or an image has no caption.
    """
    file, lavis = data / karpathy_name, data / lavis_name
    if file.is_file():
        images = [image for image in read_karpathy(file) if image.split == split]
    elif lavis.is_file():
        file = lavis
        content = read_json(file)
        if not isinstance(content, list):
            raise ValueError(f'{file}: not a list of {{"image", "caption"}}')
        images = [_lavis_image(row, split, f"{file}: [{index}]") for index, row in enumerate(content)]
    else:
        raise FileNotFoundError(f"{data}: neither {karpathy_name} nor {lavis_name} found")
    if without := [image.path for image in images if not image.captions]:
        raise ValueError(f"{file}: {len(without)} images have no caption ({', '.join(without[:3])})")
    return file, images


def _lavis_image(row: Any, split: str, where: str) -> KarpathyImage:
    """The image id is the number at the end of the file's name, as in LAVIS; else the name."""
    path, captions = field(row, "image", str, where), field(row, "caption", list, where)
    if not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f'{where}: "caption" is not a list of strings')
    stem = Path(path).stem
    number = stem.rpartition("_")[2]
    return KarpathyImage(split, path, str(int(number)) if IMAGE_NUMBER.fullmatch(number) else stem, tuple(captions))
