"""NoCaps (nocaps.org): captions of Open Images with objects that COCO's captions name often, seldom or never.

Val: 4,500 images with 10 captions each, 648 in-domain, 2,938 near-domain and 914 out-domain. Test: 10,600 images,
whose captions are not public; their results go to the EvalAI server (challenge 355).

Files, both in COCO's format (nocaps.org/download):
- nocaps_val_4500_captions.json: {"images": [{"id", "file_name", "domain"}], "annotations": [{"image_id", "caption"}]}.
- nocaps_test_image_info.json: {"images": [{"id", "file_name"}]}.
The images are named by their Open Images id, 0013ea2087020901.jpg.

Every domain is scored separately: CIDEr-D's idf comes from its own references. So is it elsewhere without the
server: LAVIS, which keeps the out-domain only, and EVCap (scripts/eval_evcap_nocaps.sh), from a file for each domain.
The server's own script is not published. BLIP-2 asks as on COCO; the X-Former paper does not say how it asks. "lavis" is
projects/blip2/eval/caption_nocaps_out_domain_flant5xl_eval.yaml, for a model that was only pretrained: no prompt.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xformer_mllm.evaluate.benchmark import CaptionRecord, Scores
from xformer_mllm.evaluate.caption_metrics import CaptionBenchmark, field, unique
from xformer_mllm.evaluate.coco_captions import BLIP2, read_captions
from xformer_mllm.files import read_json
from xformer_mllm.inference import GenerationSettings

DOMAINS = ("in-domain", "near-domain", "out-domain")
FILES = {"val": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}
NOT_PUBLIC = "the captions of the test split are not public: upload official.json to EvalAI, challenge 355"


class NoCaps(CaptionBenchmark):
    """Args: as Benchmark; `images` is the folder that holds the images, by default images in `data`."""

    name = "nocaps"
    splits = ("val", "test")
    settings = {
        "paper": BLIP2,
        "lavis": GenerationSettings(
            prompt="",
            num_beams=5,
            length_penalty=1.0,
            max_new_tokens=80,
            min_new_tokens=10,
            repetition_penalty=1.15,
        ),
    }
    files = "nocaps_val_4500_captions.json (test: nocaps_test_image_info.json), and the images in images/"

    def __init__(self, data: Path, split: str, images: Path | None = None):
        file = data / FILES[split]
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; {self.name} needs {self.files}")
        content = read_json(file)
        rows = {
            f"{file}: images[{place}]": row for place, row in enumerate(field(content, "images", list, f"{file}:"))
        }
        ids = [str(field(row, "id", int, where)) for where, row in rows.items()]
        self.records = unique([CaptionRecord(image_id, image_id) for image_id in ids], file)
        folder = images or data / "images"
        names = [field(row, "file_name", str, where) for where, row in rows.items()]
        self._files = {image_id: folder / name for image_id, name in zip(ids, names, strict=True)}
        if split == "val":
            self.references = read_captions(content, file, ids)
            domains = [_domain(row, where) for where, row in rows.items()]
            self.groups = {"all": ids} | {
                name: [image_id for image_id, domain in zip(ids, domains, strict=True) if domain == name]
                for name in DOMAINS
            }
        else:
            self.references, self.groups = {}, {}
            self.not_computed = {"every score": NOT_PUBLIC}

    def image_file(self, record: CaptionRecord) -> Path:
        return self._files[record.id]

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Only the number of answers for the test split."""
        if not self.references:
            return {"all": {"n": len(answers)}}
        return super().score(answers)


def _domain(row: Any, where: str) -> str:
    domain = field(row, "domain", str, where)
    if domain not in DOMAINS:
        raise ValueError(f"{where}.domain is {domain!r}, not one of {', '.join(DOMAINS)}")
    return domain
