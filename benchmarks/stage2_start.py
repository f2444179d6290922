"""Loss and gradient norm at the first step of stage 2, by the scale of the fresh projection.

    python benchmarks/stage2_start.py

Scene captions, which the shipped tiny OPT knows, and captions of photographs, which it has to spell letter by letter.
"""

import numpy as np
import torch
from PIL import Image

from xformer_mllm import defaults
from xformer_mllm.checkpoints import start_generation
from xformer_mllm.train.batches import Stage2Collator

PHOTOGRAPHS = (
    "a brown dog runs along the beach",
    "two people ride bicycles in the rain",
    "a bowl of fresh strawberries on a wooden table",
    "an old red tractor in a field",
    "the skyline of a city at night",
    "a cat sleeping on a blue sofa",
    "children playing football in a park",
    "a plate of pasta with basil",
)


def main() -> None:
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)) for _ in PHOTOGRAPHS]
    scenes = defaults.captions("scenes", "validation", len(PHOTOGRAPHS))
    sources = {
        "scenes": [scenes[index] for index in range(len(PHOTOGRAPHS))],
        "photographs": [
            {"id": text, "image": image, "caption": text} for image, text in zip(noise, PHOTOGRAPHS, strict=True)
        ],
    }
    print("captions     scale   loss  gradient norm  soft prompt rms  word embedding rms")
    for name, records in sources.items():
        for scale in (1.0, 0.3, 0.1, 0.0):
            model, processor = start_generation(defaults.shipped_model("xformer-stage1"), "opt", seed=0)
            model.freeze()
            with torch.no_grad():
                model.language_projection.weight.mul_(scale)
            end = model.generation_config.eos_token_id
            batch = Stage2Collator(processor, end if isinstance(end, int) else end[0], 32)(records)
            del batch["ids"]
            loss = model(**batch).loss
            loss.backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
            with torch.no_grad():
                prompt = model.language_projection(model.xformer(batch["pixel_values"]).fused_queries)
                words = model.language_model.get_input_embeddings().weight
                rms = [tensor.square().mean().sqrt().item() for tensor in (prompt, words)]
            print(f"{name:12} {scale:5.1f}  {loss.item():5.2f}  {norm.item():13.1f}  {rms[0]:15.3f}  {rms[1]:18.3f}")


if __name__ == "__main__":
    main()
