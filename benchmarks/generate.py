"""Captions and answers beside transformers' BLIP-2 of the same sizes and weights: seconds from image files to text.

    python benchmarks/generate.py [--rounds 15] [--output FILE.md]

A call decodes image files, tokenizes a prompt for each, encodes the images, generates a fixed number of tokens greedily
and decodes them, with each library's own processor, on one thread, in fp32. The sides take turns, call by call; the median
is reported. First, both generate the same tokens. `xformer` has a second encoder and the fusion, which BLIP-2 has not.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import torch
from full_size import machine
from PIL import Image
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    OPTConfig,
    ViTMAEConfig,
)

from xformer_mllm import XFormerConfig, XFormerForConditionalGeneration
from xformer_mllm.embedded.start import WEIGHTS
from xformer_mllm.model.processing_xformer import XFormerProcessor, image_processor
from xformer_mllm.variants import variant_config

SIZE, QUERIES = 224, 32
CAPTION, QUESTION = "", "Question: how many red circles are there in the image? Answer:"
NEW_TOKENS = {"caption": 20, "ask": 5}
VARIANTS = ("qformer", "xformer")


def configs(vocabulary: int, image_token: int) -> tuple[Blip2Config, XFormerConfig]:
    """ViT of 12 layers of width 384, Q-Former of 6 of 256, OPT of 6 of 512; MAE as the ViT."""
    vision = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
    clip = Blip2VisionConfig(**vision, image_size=SIZE, patch_size=14, layer_norm_eps=1e-5)
    qformer = {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "encoder_hidden_size": 384,
    }
    opt = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        word_embed_proj_dim=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        ffn_dim=2048,
        dropout=0.0,
    )
    shared = {"num_query_tokens": QUERIES, "image_token_index": image_token}
    theirs = Blip2Config(vision_config=clip, qformer_config=Blip2QFormerConfig(**qformer), text_config=opt, **shared)
    ours = XFormerConfig(
        clip_config=clip,
        clip_feature_layer=-1,
        mae_config=ViTMAEConfig(**vision, image_size=SIZE, patch_size=16),
        qformer_config=Blip2QFormerConfig(**qformer, use_qformer_text_input=False),
        text_config=opt,
        **shared,
    )
    return theirs, ours


def same_weights(blip2: torch.nn.Module, model: torch.nn.Module) -> None:
    """Copy BLIP-2's weights into our model. Its second encoder and fusion keep their own: at the start, Z' = Z_q."""
    renamed = {}
    for name, tensor in blip2.state_dict().items():
        name = name.replace("vision_model.post_layernorm", "clip_layernorm").replace(
            "vision_model", "clip_encoder.tower"
        )
        language = name.startswith("language_")
        renamed[name if language else f"xformer.{name}"] = tensor
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected, unexpected
    assert all("mae_" in name or "fusion" in name or "post_layernorm" in name for name in missing), missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizers = [AutoTokenizer.from_pretrained(WEIGHTS / "opt") for _ in range(2)]
    ours = XFormerProcessor(image_processor(SIZE), tokenizers[0], tokenizers[0], num_query_tokens=QUERIES)
    theirs = Blip2Processor(BlipImageProcessorPil(size={"height": SIZE, "width": SIZE}), tokenizers[1], QUERIES)
    assert theirs.image_token.content == "<image>"
    place = tokenizers[1].convert_tokens_to_ids("<image>")
    assert place == ours.image_token_id
    blip2_config, config = configs(len(tokenizers[0]), place)
    blip2 = Blip2ForConditionalGeneration(blip2_config).eval()
    sides = {"BLIP-2": (blip2, theirs)}
    for variant in VARIANTS:
        model = XFormerForConditionalGeneration(variant_config(variant, config)).eval()
        same_weights(blip2, model)
        sides[variant] = (model, ours)

    rng = numpy.random.default_rng(0)
    lines = ["| task | batch | side | s | BLIP-2 is 1 |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{number}.jpg" for number in range(16)]
        for file in files:
            Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=numpy.uint8)).save(file)
        for task, prompt in (("caption", CAPTION), ("ask", QUESTION)):
            for batch in (1, 16):
                call = {name: caller(*side, files[:batch], prompt, NEW_TOKENS[task]) for name, side in sides.items()}
                taken: dict[str, list[float]] = {name: [] for name in sides}
                texts = {name: run() for name, run in call.items()}
                assert len(set(map(tuple, texts.values()))) == 1, texts
                for _ in range(arguments.rounds):
                    for name, run in call.items():
                        started = time.perf_counter()
                        run()
                        taken[name].append(time.perf_counter() - started)
                base = statistics.median(taken["BLIP-2"])
                for name, seconds in taken.items():
                    middle = statistics.median(seconds)
                    lines.append(f"| {task} | {batch} | {name} | {middle:.3f} | {middle / base:.2f} |")
                print(f"{task}, batch {batch}: done", file=sys.stderr)
    lines += [
        "",
        f"`python benchmarks/generate.py --rounds {arguments.rounds}`, seed 0, {machine()}, one thread, torch "
        f"{torch.__version__}; {NEW_TOKENS['caption']} new tokens for a caption, {NEW_TOKENS['ask']} for an answer.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(f"# Captions and answers beside BLIP-2's\n\n{text}", encoding="utf-8")


def caller(model, processor, files: list[str], prompt: str, new_tokens: int):
    """A function from files to texts, as a user of either library writes it."""

    def run() -> list[str]:
        images = [Image.open(file) for file in files]
        inputs = processor(images=images, text=[prompt] * len(files), return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return run


if __name__ == "__main__":
    main()
