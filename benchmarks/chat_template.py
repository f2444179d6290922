"""What an instruct model says to a question in plain text and by its chat template: no image, no training.

python benchmarks/chat_template.py --llm smollm2 --output docs/results/chat-template.md

The scenes' full descriptions stand where stage 2 has the soft prompt; greedy, at most 12 tokens.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from xformer_mllm.checkpoints import load_language_model
from xformer_mllm.data.questions import QUESTION_PROMPT
from xformer_mllm.embedded.scene_questions import EVENLY, ask
from xformer_mllm.embedded.scenes import description
from xformer_mllm.embedded.start import WEIGHTS
from xformer_mllm.embedded.world import draw_scene
from xformer_mllm.language_models import chat_turn
from xformer_mllm.model.processing_xformer import XFormerProcessor, image_processor

TOKENS, BATCH = 12, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default="smollm2")
    parser.add_argument("--scenes", type=int, default=150, help="of the validation split, two questions on each")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    scenes = [draw_scene("validation", index) for index in range(arguments.scenes)]
    asked = [(scene, question) for scene in scenes for question in ask(scene, 2, EVENLY)]
    model, tokenizer = load_language_model(arguments.llm)
    rows, examples = [], []
    for name, turn in (("plain text", None), ("chat template", chat_turn(tokenizer)[0])):
        said = answers(model, tokenizer, turn, asked)
        pairs = list(zip(said, (question.answer for _, question in asked), strict=True))
        nothing = sum(not text for text in said) / len(said)
        right = sum(answer in words(text) for text, answer in pairs) / len(pairs)
        rows.append(f"| {name} | {nothing:.2f} | {right:.2f} |")
        examples.append(said[:4])
    lines = [
        f"# {arguments.llm}, prompted in plain text and with its chat template",
        "",
        f"{len(asked)} questions on the full text of {len(scenes)} scenes, no image and no training; greedy, at most "
        f"{TOKENS} tokens.",
        "",
        "| prompt | empty answer | contains the correct word |",
        "|---|---|---|",
        *rows,
        "",
        "| question | answer | plain text | chat template |",
        "|---|---|---|---|",
        *(
            f"| {question.question} | {question.answer} | {plain} | {chat} |".replace("\n", " ")
            for (_, question), plain, chat in zip(asked, *examples, strict=False)
        ),
        "",
        f"Made by `python benchmarks/chat_template.py --llm {arguments.llm} --scenes {arguments.scenes} --output "
        f"{arguments.output}` in {time.perf_counter() - began:.0f} seconds on one thread, torch {torch.__version__}.",
    ]
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


@torch.inference_mode()
def answers(model, tokenizer, turn, asked) -> list[str]:
    reads_images = AutoTokenizer.from_pretrained(WEIGHTS / "qformer_tokenizer")
    processor = XFormerProcessor(image_processor(48), tokenizer, reads_images, num_query_tokens=0, turn=turn)
    found = []
    for first in range(0, len(asked), BATCH):
        prompts = [
            f"{description(scene)}\n{QUESTION_PROMPT.format(question=question.question)}"
            for scene, question in asked[first : first + BATCH]
        ]
        inputs = processor(text=prompts)
        tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        found += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return found


def words(text: str) -> list[str]:
    return text.lower().replace(".", " ").replace(",", " ").split()


if __name__ == "__main__":
    main()
