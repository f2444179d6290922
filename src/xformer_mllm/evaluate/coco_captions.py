"""COCO captions on Karpathy's test and val split: 5,000 images each, all of val2014, five or more captions per image.

The split is in either of two files:
- dataset_coco.json, Karpathy's own (cs.stanford.edu/people/karpathy/deepimagesent): {"images": [{"filepath", "filename",
  "cocoid", "split", "sentences": [{"raw"}]}]} for all of COCO.
- coco_karpathy_test.json and coco_karpathy_val.json, of BLIP and LAVIS: [{"image": "val2014/COCO_val2014_....jpg",
  "caption": [...]}]. Where coco_karpathy_test_gt.json lies beside it ({"images": [{"id"}], "annotations": [{"image_id",
  "caption"}]}), the references are its, as they are in LAVIS.

How BLIP-2 asks (LAVIS projects/blip2/eval/caption_coco_opt6.7b_eval.yaml): "a photo of", 5 beams, 8 to 30 tokens. The
prompt ends without a space here: LAVIS trains on "a photo of " + caption, and BPE puts that space into the caption's
first token, so its model configuration (caption_coco_opt6.7b) asks with "a photo of"; with a trailing space the model
would continue from a token it never saw there. The caption is what comes after the prompt, and the 8 to 30 tokens are its
own (before May 2023 LAVIS counted the prompt's four among the 8). BLIP-2 reports COCO after
fine-tuning at 364 pixels; X-Former does not fine-tune, and does not say how it asks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xformer_mllm.data.formats import read_karpathy
from xformer_mllm.evaluate.benchmark import CaptionRecord
from xformer_mllm.evaluate.caption_metrics import CaptionBenchmark, field, unique
from xformer_mllm.files import read_json
from xformer_mllm.inference import GenerationSettings

PROMPT = "a photo of"
BLIP2 = GenerationSettings(prompt=PROMPT, num_beams=5, length_penalty=1.0, max_new_tokens=30, min_new_tokens=8)


class CocoCaptions(CaptionBenchmark):
    """Args: as Benchmark; `images` is the folder that holds COCO_val2014_*.jpg, by default val2014 in `data`."""

    name = "coco-captions"
    splits = ("test", "val")
    settings = {
        "paper": BLIP2,
        # LAVIS' task since December 2023 (71a2da9), after its models were released and reported.
        "lavis": GenerationSettings(
            prompt=PROMPT,
            num_beams=5,
            length_penalty=0.0,
            max_new_tokens=30,
            min_new_tokens=8,
            repetition_penalty=1.15,
        ),
    }
    files = "dataset_coco.json or coco_karpathy_{test,val}.json, and the images in val2014/"

    def __init__(self, data: Path, split: str, images: Path | None = None):
        karpathy, lavis = data / "dataset_coco.json", data / f"coco_karpathy_{split}.json"
        file = karpathy if karpathy.is_file() else lavis
        if not file.is_file():
            raise FileNotFoundError(f"{data}: neither {karpathy.name} nor {lavis.name} found; put one of them there")
        rows = _read_karpathy(karpathy, split) if file == karpathy else _read_lavis(lavis)
        self.records = unique([CaptionRecord(image_id, image_id) for image_id, _, _ in rows], file)
        self.references = {image_id: captions for image_id, _, captions in rows}
        self.groups = {"all": [record.id for record in self.records]}
        folder = images or data / "val2014"
        self._files = {image_id: folder / name for image_id, name, _ in rows}

    def image_file(self, record: CaptionRecord) -> Path:
        return self._files[record.id]


Row = tuple[str, str, list[str]]  # image id, file name, captions


def _read_karpathy(file: Path, split: str) -> list[Row]:
    images = [image for image in read_karpathy(file) if image.split == split]
    for image in images:
        if not image.image_id.isdigit():
            raise ValueError(f"{file}: {image.path} has no number as its cocoid")
    return [(p.image_id, Path(p.path).name, _some(list(p.captions), f"{file}: {p.path}")) for p in images]


def _read_lavis(file: Path) -> list[Row]:
    content = read_json(file)
    if not isinstance(content, list):
        raise ValueError(f'{file}: not a list of {{"image", "caption"}}')
    rows = [_lavis_row(image, f"{file}: [{place}]") for place, image in enumerate(content)]
    truth = file.with_name(file.stem + "_gt.json")
    if not truth.is_file():
        return rows
    captions = read_captions(read_json(truth), truth, [image_id for image_id, _, _ in rows])
    return [(image_id, name, captions[image_id]) for image_id, name, _ in rows]


def _lavis_row(image: Any, where: str) -> Row:
    """The image id is the number at the end of the file's name, as in LAVIS."""
    name = Path(field(image, "image", str, where)).name
    number = Path(name).stem.rpartition("_")[2]
    if not number.isdigit():
        raise ValueError(
            f'{where}.image is {name!r}, which does not end in an image id as "COCO_val2014_000000000042.jpg"'
        )
    captions = field(image, "caption", list, where)
    if not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{where}.caption is not a list of texts")
    return str(int(number)), name, _some(captions, where)


def read_captions(content: Any, file: Path, image_ids: Sequence[str]) -> dict[str, list[str]]:
    """COCO's "annotations" -> {image id: captions} of these images. Raises ValueError if one has no caption."""
    captions: dict[str, list[str]] = {image_id: [] for image_id in image_ids}
    for place, row in enumerate(field(content, "annotations", list, f"{file}:")):
        where = f"{file}: annotations[{place}]"
        image_id, caption = str(field(row, "image_id", int, where)), field(row, "caption", str, where)
        if image_id in captions:
            captions[image_id].append(caption)
    without = [image_id for image_id, found in captions.items() if not found]
    if without:
        raise ValueError(f"{file}: no captions of {len(without)} images ({', '.join(without[:3])})")
    return captions


def _some(captions: list[str], where: str) -> list[str]:
    if not captions:
        raise ValueError(f"{where} has no captions")
    return captions
