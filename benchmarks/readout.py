"""How the frozen encoders code texture: can a linear layer read it from one patch, or only an MLP? And after how many steps?

    python benchmarks/readout.py

Patches of objects in 4,000 training scenes (dense labels, 512 patches a step), accuracy on 1,000 validation scenes. `random`
is MAE's network untrained; `clip` is read where X-Former reads it.
"""

import numpy as np
import torch
from torch import nn

from xformer_mllm.embedded.commands import ProbeConfig
from xformer_mllm.embedded.probe import load_encoders, standardised_features
from xformer_mllm.embedded.world import GRID, TEXTURES, Scene, draw_scene

STEPS = (50, 200, 500, 1500)
PATCHES = 2  # of 8 pixels, along each side of a cell


def patch_labels(scene: Scene) -> np.ndarray:
    """int[36]: the texture of the object in each patch's cell, -1 without one."""
    labels = np.full((GRID, GRID), -1)
    for thing in scene.objects:
        labels[thing.row, thing.column] = TEXTURES.index(thing.texture)
    return labels.repeat(PATCHES, 0).repeat(PATCHES, 1).ravel()


def accuracies(readout: nn.Module, train: tuple, validation: tuple) -> list[float]:
    """Accuracy on validation after each of STEPS."""
    optimiser = torch.optim.AdamW(readout.parameters(), 2e-3, weight_decay=0.01)
    found = []
    for step in range(1, max(STEPS) + 1):
        pick = torch.randint(len(train[0]), (512,))
        loss = nn.functional.cross_entropy(readout(train[0][pick]), train[1][pick])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step in STEPS:
            with torch.no_grad():
                found.append((readout(validation[0]).argmax(1) == validation[1]).float().mean().item())
    return found


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    scenes = {split: [draw_scene(split, i) for i in range(n)] for split, n in (("train", 4000), ("validation", 1000))}
    labels = {split: torch.from_numpy(np.stack([patch_labels(s) for s in some])) for split, some in scenes.items()}
    print(f"| tokens | readout | {' | '.join(f'{step} steps' for step in STEPS)} |\n|---|---|{'---|' * len(STEPS)}")
    for name, encoder in load_encoders(ProbeConfig()).items():
        tokens = {split: states[:, 1:] for split, states in standardised_features(encoder, scenes).items()}  # no CLS
        data = [(tokens[split][labels[split] >= 0], labels[split][labels[split] >= 0]) for split in scenes]
        width = data[0][0].shape[-1]
        linear = nn.Linear(width, len(TEXTURES))
        mlp = nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, len(TEXTURES)))
        for kind, readout in (("linear", linear), ("MLP", mlp)):
            cells = " | ".join(f"{value:.3f}" for value in accuracies(readout, *data))
            print(f"| {name} | {kind} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
