"""Questions per second in vLLM, and by transformers' `generate` in batches, with the same X-Former.

    python benchmarks/vllm_throughput.py [--questions 64] [--new-tokens 32] [--rounds 5] [--output FILE.md]

In an environment with vLLM (docs/vllm.md). The model has the sizes of benchmarks/generate.py and random weights; every round
has new images, of 640 x 480, which all sides prepare, encode and answer greedily in fp32 with a fixed number of tokens. The
model runs on one thread on every side; vLLM's other processes, which prepare images and prompts, may use other cores. Sides
take turns, round by round; the median is reported. First, all give the same tokens, but for at most one answer in 20: the
weights are random, so that the first two tokens are sometimes equal up to rounding.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB

import numpy
import torch
from full_size import machine
from generate import QUERIES, SIZE, configs
from PIL import Image
from transformers import AutoTokenizer

from xformer_mllm import XFormerForConditionalGeneration
from xformer_mllm.embedded.start import WEIGHTS
from xformer_mllm.model.processing_xformer import XFormerProcessor, image_processor
from xformer_mllm.variants import variant_config

WORDS = ("red", "blue", "small", "large", "striped", "checked")


def questions(number: int, seed: int) -> list[tuple[Image.Image, str]]:
    """New images and questions of several lengths."""
    rng = numpy.random.default_rng(seed)
    found = []
    for _ in range(number):
        image = Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=numpy.uint8))
        words = " ".join(rng.choice(WORDS, rng.integers(1, 8)))
        found.append((image, f"Question: how many {words} circles are there in the image? Answer:"))
    return found


def main() -> None:
    from vllm import LLM, SamplingParams

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "opt")
    processor = XFormerProcessor(image_processor(SIZE), tokenizer, tokenizer, num_query_tokens=QUERIES)
    config = variant_config("xformer", configs(len(tokenizer), processor.image_token_id)[1])
    model = XFormerForConditionalGeneration(config).eval()
    for parameter in model.language_model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(model.language_projection.weight, std=0.3)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        llm = LLM(model=folder, dtype="float32", max_model_len=128)
    sampling = SamplingParams(temperature=0, max_tokens=arguments.new_tokens, ignore_eos=True)

    def by_vllm(asked):
        prompts = [{"prompt": prompt, "multi_modal_data": {"image": image}} for image, prompt in asked]
        return [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, sampling, use_tqdm=False)]

    def by_generate(asked, batch):
        found = []
        for start in range(0, len(asked), batch):
            images, prompts = zip(*asked[start : start + batch], strict=True)
            inputs = processor(images=list(images), text=list(prompts))
            length = {"max_new_tokens": arguments.new_tokens, "min_new_tokens": arguments.new_tokens}
            with torch.inference_mode():
                ids = model.generate(**inputs, **length, do_sample=False, eos_token_id=None)
            found += ids[:, inputs["input_ids"].shape[1] :].tolist()
        return found

    sides = {
        "generate, one by one": lambda asked: by_generate(asked, 1),
        "generate, batches of 16": lambda asked: by_generate(asked, 16),
        "vLLM": by_vllm,
    }
    asked = questions(arguments.questions, 0)
    answers = {name: answer(asked) for name, answer in sides.items()}
    for name, found in answers.items():
        different = sum(a != b for a, b in zip(found, answers["generate, one by one"], strict=True))
        assert different <= len(asked) / 20, f"{name}: {different} other answers"
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1, arguments.rounds + 1):
        asked = questions(arguments.questions, number)
        for name, answer in sides.items():
            began = time.perf_counter()
            answer(asked)
            taken[name].append(time.perf_counter() - began)
    base = statistics.median(taken["generate, one by one"])
    lines = ["| side | questions/s | times as fast |", "|---|---|---|"]
    for name, seconds in taken.items():
        middle = statistics.median(seconds)
        lines.append(f"| {name} | {arguments.questions / middle:.2f} | {base / middle:.2f} |")
    lines += [
        "",
        f"`python benchmarks/vllm_throughput.py --questions {arguments.questions} --new-tokens {arguments.new_tokens} "
        f"--rounds {arguments.rounds}`, seed 0, {machine()}, torch {torch.__version__}.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
