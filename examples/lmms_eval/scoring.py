"""What the tasks in this folder call; scores are computed by lmms-eval's own functions."""

from lmms_eval.tasks.coco_cap.utils import (
    coco_bleu1,
    coco_bleu2,
    coco_bleu3,
    coco_bleu4,
    coco_cider,
    coco_meteor,
    coco_process_result,
    coco_rougel,
)
from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val

from xformer_mllm.model.images import load_image

__all__ = [
    "coco_bleu1",
    "coco_bleu2",
    "coco_bleu3",
    "coco_bleu4",
    "coco_cider",
    "coco_meteor",
    "coco_process_result",
    "coco_rougel",
    "image",
    "nothing",
    "question",
    "vqav2_process_results_val",
]


def image(document: dict) -> list:
    return [load_image(document["image"])]


def question(document: dict) -> str:
    return document["question"]


def nothing(document: dict) -> str:
    """Of a caption, the prompt is an argument of the model."""
    return ""
