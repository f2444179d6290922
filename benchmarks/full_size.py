"""The paper's sizes with random weights, on a CPU in bf16: a step of stage 1, a step of stage 2 and a generation.

    python benchmarks/full_size.py [--output docs/results/full-size.md]

ViT-g, MAE ViT-H, the Q-Former and OPT 2.7B, batch 2. It says that everything fits together at full size and what it takes;
the numbers that come out mean nothing. Each stage is a process of its own, whose peak resident size is read at its end. It
needs 15 GB of free memory; `--tiny` does the same with the embedded world's sizes in seconds.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from step import peak_of_this_process
from transformers import AutoConfig
from transformers.initialization import no_init_weights

from xformer_mllm import VARIANTS, XFormerConfig, XFormerForConditionalGeneration, XFormerForPreTraining
from xformer_mllm.checkpoints import attention_for_device
from xformer_mllm.embedded.start import WEIGHTS, embedded_config
from xformer_mllm.estimate.costs import Work, memory
from xformer_mllm.estimate.sizes import sizes_of
from xformer_mllm.model.modeling_xformer import FROZEN

BATCH = 2
TEXT = 32
NEW_TOKENS = 10
PLACEHOLDER = 5  # any token that no text of ours has
NEEDED = 15e9
PARTS = {"stage1": XFormerForPreTraining, "stage2": XFormerForConditionalGeneration}


def config_of(part: str, variant: str = "xformer", tiny: bool = False) -> XFormerConfig:
    """The paper's sizes, or the embedded world's, as a stage has them."""
    base = embedded_config() if tiny else XFormerConfig.paper()
    if tiny:
        base.text_config = AutoConfig.from_pretrained(WEIGHTS / "opt")
    config = VARIANTS[variant](base)
    config.image_token_index = PLACEHOLDER
    config.qformer_config.use_qformer_text_input = part == "stage1"
    return config


def random_model(part: str, config: XFormerConfig, device: str = "cpu"):
    """The model of a stage: frozen parts in bf16, trained ones in fp32, made in place without a second copy of any."""
    kind = PARTS[part]
    with torch.device("meta"), no_init_weights():
        model = kind._from_config(config, attn_implementation=attention_for_device())
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in FROZEN:
            module.to(torch.bfloat16)
    model.to_empty(device=device)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data.zero_()  # the MAE's class token is so by construction alone
    for module in model.modules():
        module._is_hf_initialized = False
    torch.manual_seed(0)
    model.initialize_weights()
    model.freeze()
    return model.train()


def random_inputs(part: str, config: XFormerConfig, batch: int, device: str = "cpu") -> dict:
    """Images with captions of TEXT tokens; in stage 2 behind the image placeholders and a start token."""
    generator = torch.Generator().manual_seed(0)

    def drawn(low: int, high: int, *shape: int, **dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, **dtype).to(device)

    size = config.clip_config.image_size
    inputs = {"pixel_values": drawn(0, 256, batch, 3, size, size, dtype=torch.uint8)}
    if part == "stage1":
        ids = drawn(10, config.qformer_config.vocab_size, batch, TEXT)
        return inputs | {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}
    text = drawn(10, config.text_config.vocab_size, batch, 1 + TEXT)
    ids = torch.cat([torch.full_like(text[:, :1], PLACEHOLDER).expand(-1, config.num_query_tokens), text], dim=1)
    labels = ids.clone()
    labels[:, : config.num_query_tokens + 1] = -100
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def run_part(part: str, tiny: bool) -> dict:
    """One training step, in stage 2 also a generation: CPU seconds of each (nothing else counts), losses, peak."""
    started = time.process_time()
    config = config_of(part, tiny=tiny)
    model = random_model(part, config)
    inputs = random_inputs(part, config, BATCH)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    seconds = {"weights": time.process_time() - started}

    started = time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    seconds["forward"] = time.process_time() - started
    losses = {n: v.item() for n, v in output.items() if "loss" in n and torch.is_tensor(v)}
    started = time.process_time()
    output.loss.backward()
    reached = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    optimiser.step()
    seconds["backward and update"] = time.process_time() - started
    del output
    missed = [name for name, p in model.named_parameters() if p.requires_grad and name not in reached]

    work = Work(1 if part == "stage1" else 2, BATCH, TEXT)
    counted = sum(memory(config, sizes_of(model), work).values())
    result = {"losses": losses, "reached": len(reached), "missed": missed, "counted_bytes": counted}
    if part == "stage2":
        optimiser.zero_grad()
        model.eval()
        prompt = inputs["input_ids"][:, : config.num_query_tokens + 1]
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            tokens = model.generate(
                inputs["pixel_values"], prompt, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False
            )
        seconds["generation"] = time.process_time() - started
        result["generated"] = list(tokens[:, prompt.shape[1] :].shape)
    return {"seconds": seconds, **result, "peak_bytes": int(peak_of_this_process() * 2**20)}


def in_a_process_of_its_own(part: str, tiny: bool) -> dict:
    command = [sys.executable, __file__, "--part", part, *(["--tiny"] if tiny else [])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def free_bytes() -> float:
    """Memory that can be had without swapping; endless where Linux does not say."""
    file = Path("/proc/meminfo")
    return int(file.read_text().split("MemAvailable:")[1].split()[0]) * 1024 if file.exists() else math.inf


def page(results: dict[str, dict], tiny: bool) -> str:
    sizes = "the embedded world's sizes" if tiny else "ViT-g/14, MAE ViT-H/14, Q-Former, OPT 2.7B"
    lines = [
        "# The paper's sizes on a CPU",
        "",
        f"Random weights ({sizes}), frozen parts in bf16, batch {BATCH}, texts of {TEXT} tokens. The whole model fits",
        "in memory, a step of each stage trains every trainable part, and generation completes. Losses are at chance level.",
        "Each stage runs in its own process; peak memory is the maximum resident size of that process.",
        "",
        "| | " + " | ".join(results) + " |",
        "|---|" + "---|" * len(results),
    ]

    def row(name: str, cells: list[str]) -> None:
        lines.append(f"| {name} | {' | '.join(cells)} |")

    for name in ("weights", "forward", "backward and update", "generation"):
        found = [result["seconds"].get(name) for result in results.values()]
        row(f"{name}, CPU s", ["–" if seconds is None else f"{seconds:.1f}" for seconds in found])
    row("peak memory, GB", [f"{result['peak_bytes'] / 1e9:.2f}" for result in results.values()])
    row("counted by `xformer estimate`, GB", [f"{result['counted_bytes'] / 1e9:.2f}" for result in results.values()])
    row("trained tensors with a gradient", [_of(r["reached"], r["missed"]) for r in results.values()])
    row("losses", [", ".join(f"{n} {v:.3f}" for n, v in result["losses"].items()) for result in results.values()])
    command = "python benchmarks/full_size.py" + (" --tiny" if tiny else "")
    lines += [
        "",
        "The tensors without a gradient are the inner weights of the fusion, whose output projections are zero at step 0.",
        f"The generation is {NEW_TOKENS} tokens for each of {BATCH} images.",
        "",
        f"`OMP_NUM_THREADS={torch.get_num_threads()} {command}`, {machine()}, torch {torch.__version__}.",
    ]
    return "\n".join(lines) + "\n"


def _of(reached: int, missed: list[str]) -> str:
    return f"{reached} of {reached + len(missed)}"


def machine() -> str:
    """Processor and memory, as Linux names them."""
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if not cpuinfo.exists():
        return platform.platform()
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    total = int(meminfo.read_text().split()[1]) * 1024
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {total / 1e9:.0f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the embedded world's sizes")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(run_part(arguments.part, arguments.tiny)))
        return
    if not arguments.tiny and free_bytes() < NEEDED:
        sys.exit(f"full_size.py: needs {NEEDED / 1e9:.0f} GB of free memory, there are {free_bytes() / 1e9:.1f} GB")
    results = {part: in_a_process_of_its_own(part, arguments.tiny) for part in PARTS}
    text = page(results, arguments.tiny)
    print(json.dumps(results) if arguments.json else text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
