"""Captions, full descriptions and datasets of the embedded world."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from xformer_mllm.data.questions import Question
from xformer_mllm.embedded.scene_questions import EVENLY, PLURALS, QUESTION_TYPES, Forms, ask
from xformer_mllm.embedded.world import IMAGE_SIZE, Scene, draw_scene, render


class Detail(NamedTuple):
    """Probabilities that a phrase of a caption names what captions mostly leave out."""

    texture: float
    size_or_number: float


ALT_TEXT = Detail(0.10, 0.15)
"""Like web alt-text: what CLIP and the language model learned from."""
WRITTEN = Detail(0.50, 0.15)
"""Among the paper's 14M pairs are COCO's and Visual Genome's, which people wrote to describe: X-Former's captions."""
DETAILED = Detail(1.0, 0.5)
"""The data `scenes-detailed`."""

GROUND_NAMED = 0.05

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
OPENINGS = ("", "", "", "a photo of ", "a picture of ", "there is ")
JOINTS = (" and ", " next to ", " with ")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")


def caption(scene: Scene, detail: Detail = WRITTEN) -> str:
    """A caption: one or two main groups by colour and shape, with as much detail as `detail` says."""
    rng = random.Random(scene.key + "/caption")
    groups: dict[tuple[str, str], list] = {}
    for obj in scene.objects:
        groups.setdefault((obj.colour, obj.shape), []).append(obj)
    largest_first = sorted(groups.values(), key=lambda group: (-len(group), rng.random()))
    main = largest_first[: rng.choice((1, 2))]
    text = rng.choice(OPENINGS) + rng.choice(JOINTS).join(_phrase(group, rng, detail) for group in main)
    return text + f" on a {scene.ground} ground" if rng.random() < GROUND_NAMED else text


def _phrase(group: list, rng: random.Random, detail: Detail) -> str:
    words = [group[0].colour, group[0].shape if len(group) == 1 else PLURALS[group[0].shape]]
    if rng.random() < detail.texture and len({obj.texture for obj in group}) == 1:
        words.insert(0, group[0].texture)
    detailed = rng.random() < detail.size_or_number
    if detailed and len({obj.size for obj in group}) == 1:
        words.insert(0, group[0].size)
    if len(group) == 1:
        words.insert(0, "a")
    elif detailed:
        words.insert(0, NUMBERS[len(group)])
    return " ".join(words)


def description(scene: Scene, rng: random.Random | None = None) -> str:
    """The complete scene as text, for the language model only; objects in the scene's order, or shuffled by `rng`."""
    objects = list(scene.objects)
    if rng is not None:
        rng.shuffle(objects)
    phrases = [f"{t.size} {t.texture} {t.colour} {t.shape} {ROWS[t.row]} {COLUMNS[t.column]}" for t in objects]
    return " , ".join([*phrases, f"{scene.ground} ground"])


@dataclass(frozen=True, eq=False)
class World:
    """What draws and describes a kind of scene: an object with a `key`, determined by its split, index and seed."""

    draw: Callable[..., Any]
    """split, index, seed -> scene."""
    render: Callable[[Any], np.ndarray]
    """scene -> uint8[H, W, 3]."""
    caption: Callable[[Any, Detail], str]
    description: Callable[..., str]
    """scene, optional rng for the order -> the complete scene as text."""
    ask: Callable[[Any, int], list[Question]]
    """scene, number -> questions, in training and tests."""
    ask_evenly: Callable[[Any, int], list[Question]]
    """The same for the tiny language model."""
    forms: Forms
    """Every type of question, for the probes."""
    image_size: int
    patch_size: int
    """Of the tiny encoders."""


SCENES = World(
    draw_scene, render, caption, description, ask, partial(ask, types=EVENLY), QUESTION_TYPES, IMAGE_SIZE, patch_size=8
)


@lru_cache(maxsize=4096)
def image_of(scene: Any, world: World = SCENES) -> Image.Image:
    """The scene, RGB. Cached: the questions of a scene are adjacent and share their image."""
    return Image.fromarray(world.render(scene))


@lru_cache(maxsize=4096)
def _asked(scene: Any, questions: int, world: World) -> list:
    return world.ask(scene, questions)


class SceneCaptions(Dataset):
    """`size` scenes of a split ("train", "validation", "test") with their captions.

    Item: {"id": str, "image": PIL.Image (RGB), "caption": str}.
    """

    def __init__(self, split: str, size: int, seed: int = 0, detail: Detail = WRITTEN, world: World = SCENES):
        world.draw(split, 0, seed)  # raises for an unknown split
        self.split, self.size, self.seed, self.detail, self.world = split, size, seed, detail, world

    def __len__(self) -> int:
        return self.size

    def scene(self, index: int) -> Any:
        """The scene of item `index`. Raises IndexError if out of range."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.world.draw(self.split, index, self.seed)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scene(index)
        caption = self.world.caption(scene, self.detail)
        return {"id": scene.key, "image": image_of(scene, self.world), "caption": caption}


class SceneQuestions(Dataset):
    """`questions_per_scene` questions of different types about each of `size` scenes; those of a scene are adjacent.

    Item: `Question.item` of data/questions.py. `len` is size * questions_per_scene.
    """

    def __init__(self, split: str, size: int, seed: int = 0, questions_per_scene: int = 4, world: World = SCENES):
        world.ask(world.draw(split, 0, seed), questions_per_scene)
        self.split, self.size, self.seed, self.world = split, size, seed, world
        self.questions_per_scene = questions_per_scene

    def __len__(self) -> int:
        return self.size * self.questions_per_scene

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        scene_index, which = divmod(index, self.questions_per_scene)
        scene = self.world.draw(self.split, scene_index, self.seed)
        return _asked(scene, self.questions_per_scene, self.world)[which].item(image_of(scene, self.world))
