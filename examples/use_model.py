"""Ask, caption and look inside: the models that ship with the package on an example image.

python examples/use_model.py
"""

from transformers import AutoModelForImageTextToText, AutoModelForPreTraining, AutoProcessor

import xformer_mllm
from xformer_mllm.defaults import example_images

image = example_images()[0]

# Stage 2: questions, answered by the frozen language model after the soft prompt Z'.
folder = xformer_mllm.shipped_model("xformer")
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
questions = ["How many objects are there in the image?", "What colour is the triangle?"]
inputs = processor(images=[image] * 2, text=[f"Question: {question} Answer:" for question in questions])
new = model.generate(**inputs, max_new_tokens=5)[:, inputs["input_ids"].shape[1] :]
answers = processor.batch_decode(new, skip_special_tokens=True)
for question, answer in zip(questions, answers, strict=True):
    print(f"{question} {answer.strip()}")

# Stage 1: a caption, written by the Q-Former alone.
folder = xformer_mllm.shipped_model("xformer-stage1")
model, processor = AutoModelForPreTraining.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
pixels = processor(images=image)["pixel_values"]
tokens = model.caption(pixels, processor.qformer_tokenizer.sep_token_id, max_new_tokens=20)
print("caption:", processor.qformer_tokenizer.batch_decode(tokens, skip_special_tokens=True)[0])

# Every tensor of the paper's figure.
stages = model.xformer(pixels)
for name in ("clip_tokens", "mae_tokens", "queries", "fused_queries", "enriched_mae_tokens"):
    print(f"{name:20} {tuple(stages[name].shape)}")
