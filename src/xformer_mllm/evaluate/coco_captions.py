"""COCO captions on Karpathy's test and val split: 5,000 images each, all of val2014, five or more captions per image.

`karpathy.py` reads the split. If coco_karpathy_test_gt.json is next to LAVIS's file ({"images": [{"id"}], "annotations":
[{"image_id", "caption"}]}), the references are taken from it, as in LAVIS.

BLIP-2's prompt (LAVIS projects/blip2/eval/caption_coco_opt6.7b_eval.yaml): "a photo of", 5 beams, 8 to 30 tokens. The
prompt ends without a space: LAVIS trains on "a photo of " + caption, and BPE puts that space into the caption's first
token, so a trailing space would be followed by a token never seen there. The 8 to 30 tokens do not count the prompt's
(before May 2023 LAVIS counted its four among the 8). BLIP-2 reports COCO after fine-tuning at 364 pixels; X-Former does
not fine-tune, and its paper does not give the prompt.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xformer_mllm.evaluate.benchmark import CaptionRecord, check_images, field
from xformer_mllm.evaluate.caption_metrics import SHOWN_CHARACTERS, CaptionBenchmark
from xformer_mllm.evaluate.karpathy import IMAGE_NUMBER, read_split
from xformer_mllm.files import read_json
from xformer_mllm.inference import GenerationSettings

BLIP2 = GenerationSettings(prompt="a photo of", num_beams=5, length_penalty=1.0, max_new_tokens=30, min_new_tokens=8)


class CocoCaptions(CaptionBenchmark):
    """COCO captions. `images` is the folder that holds COCO_val2014_*.jpg; by default val2014 in `data`."""

    name = "coco-captions"
    splits = ("test", "val")
    settings = {
        "paper": BLIP2,
        # LAVIS's task since December 2023 (71a2da9), after its models were released and reported.
        "lavis": replace(BLIP2, length_penalty=0.0, repetition_penalty=1.15),
    }
    files = "dataset_coco.json or coco_karpathy_{test,val}.json, and the images in val2014/"

    def __init__(self, data: Path, split: str, images: Path | None = None):
        file, found = read_split(data, split, "dataset_coco.json", f"coco_karpathy_{split}.json")
        for image in found:
            if not IMAGE_NUMBER.fullmatch(image.image_id):
                raise ValueError(f"{file}: the image id of {image.path[:SHOWN_CHARACTERS]} is not a number")
        ids = [image.image_id for image in found]
        check_images(file, split, ids)
        truth = file.with_name(f"coco_karpathy_{split}_gt.json")
        if file.name != "dataset_coco.json" and truth.is_file():
            self.references = read_captions(read_json(truth), truth, ids)
        else:
            self.references = {image.image_id: list(image.captions) for image in found}
        self.records = [CaptionRecord(image_id, image_id) for image_id in ids]
        self.groups = {"all": ids}
        self.paths = {image.image_id: (images or data / "val2014") / Path(image.path).name for image in found}


def read_captions(content: Any, file: Path, image_ids: Sequence[str]) -> dict[str, list[str]]:
    """COCO's "annotations" -> {image id: captions} of these images. Raises ValueError if one has no caption."""
    captions: dict[str, list[str]] = {image_id: [] for image_id in image_ids}
    for index, row in enumerate(field(content, "annotations", list, str(file))):
        where = f"{file}: annotations[{index}]"
        image_id, caption = str(field(row, "image_id", int, where)), field(row, "caption", str, where)
        if image_id in captions:
            captions[image_id].append(caption)
    if without := [image_id for image_id, found in captions.items() if not found]:
        raise ValueError(f"{file}: no captions of {len(without)} images ({', '.join(without[:3])})")
    return captions
