"""Trained weights and operations of the demo's runs, counted on its own batches by torch's FlopCounterMode.

    python benchmarks/flops.py

`recipes/studies/scenes-matched.json` has its settings from here: a Q-Former with as many weights as X-Former, and one that
trains longer, until it has cost as many operations in each stage. Frozen parts are counted, too; the optimizer is not.
"""

import tempfile

import torch
from torch.utils.flop_counter import FlopCounterMode

from xformer_mllm.checkpoints import start_generation
from xformer_mllm.embedded.commands import DemoConfig
from xformer_mllm.embedded.start import start_pretraining
from xformer_mllm.train import datasets
from xformer_mllm.train.batches import Stage1Collator, Stage2Collator
from xformer_mllm.train.config import Stage1Config, Stage2Config

WIDER = ("qformer_config.hidden_size=144", "qformer_config.intermediate_size=576")
STEPS = {1: DemoConfig.stage1_steps, 2: 800}


def counted(model, batch: dict) -> tuple[int, int]:
    """Trained weights, and operations of one step forward and backward."""
    del batch["ids"]
    model.freeze()
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad), counter.get_total_flops()


def of_stages(variant: str, settings: tuple[str, ...] = ()) -> dict[int, tuple[int, int]]:
    """Stage -> `counted`, as the demo trains it: stage 2 on questions that the queries read, too."""
    torch.manual_seed(0)
    config = Stage1Config()
    model, processor = start_pretraining(variant, settings=settings)
    train, _ = datasets.captions(config, 48)
    collator = Stage1Collator(processor, config.max_text_tokens)
    first = counted(model, collator(datasets.records_of(train, config.batch_size)))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        model, processor = start_generation(folder, instruction_aware=True)
    later = Stage2Config(text="questions")
    train, _ = datasets.questions(later, 48)
    collator = Stage2Collator(processor, model.generation_config.eos_token_id, later.max_text_tokens)
    return {1: first, 2: counted(model, collator(datasets.records_of(train, later.batch_size)))}


def main() -> None:
    base = of_stages("qformer")
    rows = {
        "qformer": base,
        f"qformer {' '.join(WIDER)}": of_stages("qformer", WIDER),
        "xformer": of_stages("xformer"),
    }
    for name, stages in rows.items():
        for stage, (weights, operations) in stages.items():
            ratio = operations / base[stage][1]
            print(
                f"{name}, stage {stage}: {weights:,} weights, {operations / 1e9:.2f} GFLOPs a step, {ratio:.3f} times; "
                f"{STEPS[stage]} steps cost as much as {STEPS[stage] * ratio:.0f} of qformer"
            )


if __name__ == "__main__":
    main()
