"""A stage-1 step of ours beside LAVIS's own, on the same weights, images and texts: seconds, and their ratios.

    make bench-peers        # or: python benchmarks/peers.py --python PEERS/bin/python [--rounds 7] [--output FILE.md]

LAVIS 1.0.2 from PyPI runs in an environment of its own (`lavis_stage1.py`). A step is tokenizing, forward and backward of
a batch of image features with a caption each, on one thread, without an update; captions are of 32 tokens, or of 8 to 20,
as COCO's are (LAVIS pads them to 32), in batches as they come or of like lengths (`--group-by-length`). The sides take
turns, step by step, so that what else the machine does hits all alike; the median is reported. First, both compute ITC
and ITG without dropout, which must be equal (ITM's negatives are drawn).

fp32 on a CPU: torch multiplies by MKL unless it is told otherwise, as `xformer train` does where oneDNN is as exact.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from full_size import machine
from transformers import BertTokenizer, Blip2QFormerConfig, CLIPVisionConfig

from xformer_mllm import XFormerConfig, XFormerForPreTraining
from xformer_mllm.checkpoints import attention_for_device, bf16_is_fast
from xformer_mllm.convert.layouts import BLIP2, LAVIS, as_they_are, translate
from xformer_mllm.convert.sources import Source
from xformer_mllm.model.processing_xformer import XFormerProcessor, image_processor
from xformer_mllm.processes import keep_freed_memory, multiply_fp32_by_onednn
from xformer_mllm.train.batches import Stage1Collator
from xformer_mllm.train.loop import ALIKE_WITHIN

LENGTHS = {"32": (32, 32), "8 to 20": (8, 20), "8 to 20, grouped": (8, 20)}
MAX_TOKENS = 32
VOCABULARY = 30523  # BERT's and [DEC]
NO_PIXELS = torch.zeros(3, 1, 1, dtype=torch.uint8)  # the features are given
ONEDNN = "fp32 by oneDNN"
EQUAL = 1e-4  # of the losses, relative
SMALL = {"width": 256, "layers": 6, "heads": 4, "image_width": 512}
PAPER = {"width": 768, "layers": 12, "heads": 12, "image_width": 1408}


class Lavis:
    """LAVIS's model in a process of its own."""

    def __init__(self, python: str, sizes: Path):
        command = [python, str(Path(__file__).with_name("lavis_stage1.py")), str(sizes)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.torch = self._answer()["torch"]

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit("peers.py: LAVIS stopped; its error is above (`make bench-peers` installs what it needs)")
        return json.loads(line)

    def __call__(self, **request) -> dict:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()


class Ours:
    """Our `qformer` (BLIP-2), with LAVIS's weights."""

    def __init__(self, sizes: dict, compiled: bool = False):
        self.device = sizes["device"]
        tokenizer = BertTokenizer(sizes["vocabulary_file"], bos_token="[DEC]")
        self.collate = Stage1Collator(XFormerProcessor(image_processor(224), tokenizer, tokenizer), MAX_TOKENS)
        self.features = {"clip": torch.load(sizes["features"]).unsqueeze(1).to(self.device)}
        self.model = XFormerForPreTraining._from_config(config_of(sizes), attn_implementation=attention_for_device())
        theirs = Source("LAVIS", "LAVIS", torch.load(sizes["weights"], map_location="cpu"))
        weights = translate(translate(as_they_are(theirs), LAVIS), BLIP2)
        weights = {name: piece.tensor() for name, piece in weights.items()}
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        unset = [name for name in missing if not name.startswith(("xformer.clip_encoder", "itg_head"))]
        assert not [*unset, *unexpected], (unset, unexpected)
        self.model.freeze()
        self.model.to(self.device)
        if compiled:
            self.model.compile()

    def __call__(self, texts: list[str], precision: str, train: bool) -> dict:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16" if precision == ONEDNN else "none"
        self.model.train(train)
        self.model.zero_grad()
        started = time.perf_counter()
        batch = self.collate([{"id": text, "image": NO_PIXELS, "caption": text} for text in texts])
        inputs = {name: value.to(self.device) for name, value in batch.items() if name != "ids"}
        with torch.autocast(self.device, torch.bfloat16, enabled=precision == "bf16"):
            output = self.model(**inputs, features=self.features)
        if train:
            output.loss.backward()
        losses = {"itc": output.itc_loss.item(), "itg": output.itg_loss.item()}
        return {"seconds": time.perf_counter() - started, **losses}


def config_of(sizes: dict) -> XFormerConfig:
    clip = CLIPVisionConfig(
        hidden_size=sizes["image_width"], num_hidden_layers=1, num_attention_heads=1, image_size=224, patch_size=14
    )
    qformer = Blip2QFormerConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=4 * sizes["width"],
        encoder_hidden_size=sizes["image_width"],
        hidden_dropout_prob=sizes["dropout"],
        attention_probs_dropout_prob=sizes["dropout"],
        use_qformer_text_input=True,
    )
    return XFormerConfig(
        clip_config=clip,
        clip_feature_layer=-1,
        qformer_config=qformer,
        fusion="none",
        reconstruction=False,
        text_start_token_id=VOCABULARY - 1,
    )


def texts_of(rng: random.Random, batch: int, shortest: int, longest: int, grouped: bool = False) -> list[str]:
    """Captions of so many tokens, with [CLS] and [SEP]; grouped: one batch of many that are sorted by length."""
    batches = ALIKE_WITHIN if grouped else 1
    lengths = sorted(rng.randint(shortest, longest) - 2 for _ in range(batch * batches))
    start = batch * rng.randrange(batches)
    lengths = lengths[start : start + batch]
    return [" ".join(f"w{rng.randrange(VOCABULARY - 6)}" for _ in range(length)) for length in lengths]


def write_inputs(folder: Path, arguments: argparse.Namespace) -> dict:
    """Write what both sides read: a vocabulary, image features, and the sizes."""
    sizes = {
        **(PAPER if arguments.paper else SMALL),
        "queries": 32,
        "max_tokens": MAX_TOKENS,
        "vocabulary": VOCABULARY,
        "dropout": arguments.dropout,
        "device": arguments.device,
        "vocabulary_file": str(folder / "vocab.txt"),
        "features": str(folder / "features.pt"),
        "weights": str(folder / "weights.pt"),
    }
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(VOCABULARY - 6))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    generator = torch.Generator().manual_seed(0)
    torch.save(torch.randn(arguments.batch, 257, sizes["image_width"], generator=generator), sizes["features"])
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return sizes


def onednn_is_exact() -> bool:
    multiply_fp32_by_onednn()
    return torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def check_equal(lavis: Lavis, ours: Ours, texts: list[str]) -> None:
    theirs, own = (side(texts=texts, precision="fp32", train=False) for side in (lavis, ours))
    for loss in ("itc", "itg"):
        difference = abs(theirs[loss] - own[loss]) / theirs[loss]
        print(f"{loss}: LAVIS {theirs[loss]:.6f}, ours {own[loss]:.6f}", file=sys.stderr)
        if difference > EQUAL:
            sys.exit(f"peers.py: {loss} differs; the work is not the same")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment that has LAVIS")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.1, help="BERT's, with which both are trained")
    parser.add_argument("--paper", action="store_true", help="the paper's sizes (ViT-g, BERT-base)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as in training
    with tempfile.TemporaryDirectory() as folder:
        sizes = write_inputs(Path(folder), arguments)
        lavis = Lavis(arguments.python, Path(folder) / "sizes.json")
        ours = Ours(sizes)
        check_equal(lavis, ours, texts_of(random.Random(0), arguments.batch, 8, 20))
        precisions = ["fp32", *([ONEDNN] if onednn_is_exact() else []), *(["bf16"] if bf16_is_fast() else [])]
        sides = {
            f"{name}, {precision}": (side, precision)
            for precision in precisions
            for name, side in (("LAVIS", lavis), ("ours", ours))
        }
        if arguments.device == "cuda":
            sides["ours, bf16, torch.compile"] = (Ours(sizes, compiled=True), "bf16")
        lines = ["| captions, tokens | side | s/step | LAVIS in fp32 takes |", "|---|---|---|---|"]
        for name, (shortest, longest) in LENGTHS.items():
            taken: dict[str, list[float]] = {side: [] for side in sides}
            rng = random.Random(1)
            for number in range(arguments.rounds + 1):
                texts = texts_of(rng, arguments.batch, shortest, longest, name.endswith("grouped"))
                for side, (step, precision) in sides.items():
                    seconds = step(texts=texts, precision=precision, train=True)["seconds"]
                    if number:  # the first one warms up
                        taken[side].append(seconds)
                print(f"{name} tokens: round {number} of {arguments.rounds}", file=sys.stderr)
            base = statistics.median(taken["LAVIS, fp32"])
            for side, seconds in taken.items():
                middle = statistics.median(seconds)
                lines.append(f"| {name} | {side} | {middle:.3f} | {base / middle:.2f} × |")
    lines += [
        "",
        f"`python benchmarks/peers.py {' '.join(sys.argv[1:])}`, seed 0, "
        f"{torch.cuda.get_device_name() if arguments.device == 'cuda' else machine()}, "
        f"torch {torch.__version__} (LAVIS: {lavis.torch}).",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(f"# A step of stage 1 beside LAVIS's\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
