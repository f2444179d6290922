"""X-Former as a model of VLMEvalKit (https://github.com/open-compass/VLMEvalKit).

Copy this file to `vlmeval/vlm/xformer.py`, import its class in `vlmeval/vlm/__init__.py`, and name a model in
`vlmeval/config.py`:

    "xformer": partial(XFormer, model_path="runs/stage2"),

Then `python run.py --data MMBench_DEV_EN --model xformer`.
"""

from pathlib import Path
from typing import Any

from vlmeval.vlm.base import BaseModel  # type: ignore[import-not-found]

from xformer_mllm.checkpoints import load_model
from xformer_mllm.data.questions import QUESTION_PROMPT
from xformer_mllm.inference import generate, open_image
from xformer_mllm.model.modeling_xformer import XFormerForConditionalGeneration


class XFormer(BaseModel):
    """A stage-2 X-Former, or any variant; it reads one image and its text.

    Args:
        model_path: folder of a stage-2 run, or of its model.
        prompt: text after the image; {question} is the message's text.
        options: arguments of `generate`; greedy by default.
    """

    INTERLEAVE = False

    def __init__(self, model_path: str, prompt: str = QUESTION_PROMPT, **options: Any):
        self.model, self.processor = load_model(Path(model_path), [XFormerForConditionalGeneration])
        self.prompt = prompt
        self.options = {"max_new_tokens": 32, "do_sample": False} | options

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """Answer a message, a list of {"type": "image" or "text", "value": path or text}.

        Raises ValueError for none or several images: leaving one out would change the benchmark.
        """
        images = [part["value"] for part in message if part["type"] == "image"]
        if len(images) != 1:
            raise ValueError(f"{dataset}: a message has {len(images)} images; X-Former reads exactly one")
        text = "\n".join(part["value"] for part in message if part["type"] == "text")
        pixels = self.processor(images=open_image(images[0]))["pixel_values"].to(self.model.device)
        prompt = self.prompt.replace("{question}", text)
        (answer,) = generate(self.model, self.processor, [prompt], pixels, **self.options)
        return answer.text.strip()
