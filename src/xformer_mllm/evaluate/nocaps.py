"""NoCaps (nocaps.org): captions of Open Images with objects that COCO's captions name often, seldom or never.

Val: 4,500 images with 10 captions each, 648 in-domain, 2,938 near-domain and 914 out-domain. Test: 10,600 images,
whose captions are not public; their results go to the EvalAI server (challenge 355).

Files, both in COCO's format (nocaps.org/download); the images are named by their Open Images id, 0013ea2087020901.jpg:
- nocaps_val_4500_captions.json: {"images": [{"id", "file_name", "domain"}], "annotations": [{"image_id", "caption"}]}.
- nocaps_test_image_info.json: {"images": [{"id", "file_name"}]}.

Every domain is scored separately: CIDEr-D's idf comes from its own references. Others who score without the server do
the same: LAVIS, for the out-domain only, and EVCap (scripts/eval_evcap_nocaps.sh), with a file for each domain. The
server's own script is not published. BLIP-2 prompts as on COCO; the X-Former paper does not give its prompt. "lavis" is
projects/blip2/eval/caption_nocaps_out_domain_flant5xl_eval.yaml, for a model that was only pretrained: no prompt.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from xformer_mllm.evaluate.benchmark import CaptionRecord, Scores, check_images, field
from xformer_mllm.evaluate.caption_metrics import CaptionBenchmark
from xformer_mllm.evaluate.coco_captions import BLIP2, read_captions
from xformer_mllm.files import read_json

DOMAINS = ("in-domain", "near-domain", "out-domain")
FILES = {"val": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}
NOT_PUBLIC = "the captions of the test split are not public: upload official.json to EvalAI, challenge 355"


class NoCaps(CaptionBenchmark):
    """NoCaps. `images` is the folder that holds the images; by default images in `data`."""

    name = "nocaps"
    splits = ("val", "test")
    settings = {
        "paper": BLIP2,
        "lavis": replace(BLIP2, prompt="", max_new_tokens=80, min_new_tokens=10, repetition_penalty=1.15),
    }
    files = "nocaps_val_4500_captions.json (test: nocaps_test_image_info.json), and the images in images/"

    def __init__(self, data: Path, split: str, images: Path | None = None):
        file, self.paths, self.references, self.groups = data / FILES[split], {}, {}, {}
        content = read_json(file)
        ids: list[str] = []
        groups: dict[str, list[str]] = {"all": ids} | {domain: [] for domain in DOMAINS}
        for index, row in enumerate(field(content, "images", list, str(file))):
            where = f"{file}: images[{index}]"
            image_id, name = str(field(row, "id", int, where)), field(row, "file_name", str, where)
            ids.append(image_id)
            self.paths[image_id] = (images or data / "images") / name
            if split == "val":
                domain = field(row, "domain", str, where)
                if domain not in DOMAINS:
                    raise ValueError(f"{where}.domain is {domain!r}, not one of {', '.join(DOMAINS)}")
                groups[domain].append(image_id)
        check_images(file, split, ids)
        self.records = [CaptionRecord(image_id, image_id) for image_id in ids]
        if split == "val":
            self.references, self.groups = read_captions(content, file, ids), groups
        else:
            self.not_computed = {"every score": NOT_PUBLIC}

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Only the number of answers for the test split."""
        return super().score(answers) if self.references else {"all": {"n": len(answers)}}
