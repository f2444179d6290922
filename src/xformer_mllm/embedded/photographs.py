"""Photographic scenes: cut-outs of photographs on grounds like those of photographs, 96x96 pixels.

The cut-outs are those of Tux Paint's stamps (Debian's package tuxpaint-stamps-default, GPL-2), which must be installed; the
folder may also be named by the environment variable XFORMER_STAMPS. The folders of the stamps are the categories, the first
line of the text beside a stamp names the object. Some objects of every category are held out: validation and test show
others than training, so that a category has to be recognised, not a cut-out.

An object is sharp or blurred, which captions seldom say, as those of scenes leave out texture. As a scene, a photograph is
determined by (seed, split, index).
"""

import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from xformer_mllm.data.questions import Question
from xformer_mllm.embedded.scene_questions import COUNT_WEIGHTS, Asked, Forms, ask
from xformer_mllm.embedded.scenes import JOINTS, NUMBERS, OPENINGS, SCENES, WRITTEN, Detail, World
from xformer_mllm.embedded.world import GRID, SPLITS

STAMPS = Path("/usr/share/tuxpaint/stamps")
FOLDER_VARIABLE = "XFORMER_STAMPS"

# Category -> its folders; drawings are left out.
CATEGORIES = {
    "bird": ("animals/birds",),
    "fish": ("animals/fish",),
    "insect": ("animals/insects",),
    "mammal": ("animals/mammals", "animals/marsupials"),
    "fruit": ("food/fruit",),
    "vegetable": ("food/vegetables",),
    "flower": ("plants/flowers",),
    "vehicle": ("vehicles", "military/vehicles"),
    "instrument": ("hobbies/music",),
    "tool": ("household/tools",),
    "coin": tuple(f"symbols/money/{country}" for country in ("canadian", "euro", "japanese", "us")),
}
PLURALS = {category: f"{category}s" for category in CATEGORIES} | {"fish": "fish"}
# Of ten objects of a category in alphabetical order, these are held out.
HELD_OUT = {"validation": (4,), "test": (2, 7)}

IMAGE_SIZE = 96
CELL = IMAGE_SIZE // GRID
FOCUS = ("sharp", "blurred")
BLUR = 1.0  # pixels, standard deviation of the blur of an object
MARGIN = 2  # pixels around an object, for its blur
SIZES = (20, 24, 28)  # pixels, the longer side of an object
NOISE = 10  # maximum of the uniform pixel noise, in grey levels

GROUNDS = (
    (86, 118, 60),
    (190, 165, 120),
    (140, 175, 205),
    (70, 110, 130),
    (110, 85, 60),
    (205, 210, 215),
    (125, 125, 120),
)
"""Mean colours: grass, sand, sky, water, soil, snow, stone."""
GROUND_CONTRAST = 22.0  # standard deviation of the brightness, in grey levels
FIELD_SIZE = 512


@dataclass(frozen=True, slots=True)
class Stamp:
    """A cut-out: its file, category and the name of what it shows."""

    path: Path
    category: str
    name: str


@dataclass(frozen=True, slots=True)
class Cutout:
    """An object: a stamp in focus or not, its longer side in pixels, and its cell (row and column, from the top left)."""

    stamp: Stamp
    focus: str
    size: int
    mirrored: bool
    row: int
    column: int

    @property
    def category(self) -> str:
        return self.stamp.category


@dataclass(frozen=True, slots=True)
class Photograph:
    """A scene of cut-outs: `key` ("photographs/seed/split/index") identifies it and seeds its image and texts."""

    key: str
    objects: tuple[Cutout, ...]


def stamps() -> dict[str, dict[str, list[Stamp]]]:
    """Split -> category -> its stamps; objects of the same name are in the same split.

    Raises FileNotFoundError if the stamps are not installed or a category has too few of them.
    """
    return _read_stamps(Path(os.environ.get(FOLDER_VARIABLE) or STAMPS))


@cache
def _read_stamps(folder: Path) -> dict[str, dict[str, list[Stamp]]]:
    install = (
        "the photographs are made of Tux Paint's stamps: apt-get install tuxpaint-stamps-default, or set "
        f"{FOLDER_VARIABLE} to the folder of the stamps"
    )
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {install}")
    found: dict[str, dict[str, list[Stamp]]] = {split: {} for split in SPLITS}
    for category, places in CATEGORIES.items():
        by_name: dict[str, list[Stamp]] = {}
        for path in sorted(path for place in places for path in (folder / place).rglob("*.png")):
            if "cartoon" not in path.parts and path.with_suffix(".txt").is_file():
                name = _name(path)
                by_name.setdefault(name, []).append(Stamp(path, category, name))
        for number, name in enumerate(sorted(by_name)):
            split = next((split for split, places in HELD_OUT.items() if number % 10 in places), "train")
            found[split].setdefault(category, []).extend(by_name[name])
        if missing := [split for split in SPLITS if category not in found[split]]:
            raise FileNotFoundError(f"{folder}: too few stamps of {PLURALS[category]} for {missing[0]}; {install}")
    return found


def _name(path: Path) -> str:
    """What a stamp shows: its text without the article if that is a name of up to three words, else its file's name."""
    text = path.with_suffix(".txt").read_text(encoding="utf-8").partition("\n")[0].strip()
    named = re.fullmatch(r"(?:an? |the )?([a-z]+(?:[ -][a-z]+){0,2})\.?", text.lower())
    words = named[1] if named else " ".join(re.findall(r"[a-z]+", path.stem.lower()))
    return words.replace("-", " ") or "coin"  # the euro's files are numbers


def draw_photograph(split: str, index: int, seed: int = 0) -> Photograph:
    """The photograph at `index` of `split`. Raises ValueError for an unknown split, FileNotFoundError without stamps."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    by_category = stamps()[split]
    key = f"photographs/{seed}/{split}/{index}"
    rng = random.Random(key)
    count = rng.randint(1, 6)
    cells = rng.sample(range(GRID * GRID), count)
    objects: list[Cutout] = []
    while len(objects) < count:
        category = rng.choice(list(by_category))
        for _ in range(min(rng.choice((1, 1, 1, 2, 2, 3)), count - len(objects))):
            row, column = divmod(cells[len(objects)], GRID)
            stamp, size = rng.choice(by_category[category]), rng.choice(SIZES)
            objects.append(Cutout(stamp, rng.choice(FOCUS), size, rng.random() < 0.5, row, column))
    return Photograph(key, tuple(objects))


def render(photograph: Photograph) -> np.ndarray:
    """The photograph as uint8[96, 96, 3], RGB."""
    rng = random.Random(photograph.key + "/render")
    image = _ground(rng)
    for obj in photograph.objects:
        pixels = _pixels(obj.stamp.path, obj.size, obj.focus == "blurred")
        if obj.mirrored:
            pixels = pixels[:, ::-1]
        height, width = pixels.shape[:2]
        top = obj.row * CELL + rng.randint(0, CELL - height)
        left = obj.column * CELL + rng.randint(0, CELL - width)
        area = image[top : top + height, left : left + width]
        area += pixels[..., 3:] * np.float32(1 / 255) * (pixels[..., :3] - area)
    noise = np.frombuffer(rng.randbytes(image.size), np.uint8).reshape(image.shape)
    image += noise * np.float32(2 * NOISE / 255) - np.float32(NOISE)
    return np.clip(image, 0, 255).astype(np.uint8)


def _ground(rng: random.Random) -> np.ndarray:
    """float32[96, 96, 3]: a part of the noise field in a colour of GROUNDS, brighter towards one side."""
    top, left = rng.randrange(FIELD_SIZE - IMAGE_SIZE), rng.randrange(FIELD_SIZE - IMAGE_SIZE)
    field = _field()[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
    light = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32) * np.float32(rng.uniform(-25, 25))
    colour = [level + rng.uniform(-20, 20) for level in rng.choice(GROUNDS)]
    brightness = field[..., :1] * np.float32(GROUND_CONTRAST * rng.uniform(0.4, 1.2))
    return brightness + field[..., 1:] * np.float32(5) + light[:, None, None] + np.array(colour, np.float32)


@cache
def _field() -> np.ndarray:
    """float32[512, 512, 4] of mean 0 and deviation 1: noise whose amplitude falls with the frequency, as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(FIELD_SIZE)[:, None], np.fft.rfftfreq(FIELD_SIZE)[None])
    frequency[0, 0] = np.inf
    white = np.random.default_rng(0).standard_normal((4, FIELD_SIZE, FIELD_SIZE))
    field = np.fft.irfft2(np.fft.rfft2(white) / frequency, (FIELD_SIZE, FIELD_SIZE))
    return np.moveaxis(field / field.std((1, 2), keepdims=True), 0, -1).astype(np.float32)


@cache
def _pixels(path: Path, size: int, blurred: bool) -> np.ndarray:
    """A stamp as uint8[H, W, 4], RGBA, its longer side `size` and around it MARGIN."""
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    scale = size / max(image.size)
    # With alpha multiplied in, the invisible colour around a cut-out does not mix into its edge.
    small = image.convert("RGBa").resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    small = ImageOps.expand(small, MARGIN)
    if blurred:
        small = small.filter(ImageFilter.GaussianBlur(BLUR))
    return np.asarray(small.convert("RGBA"))


# ------------------------------------------------------------------------------------------------------------------ text


def caption(photograph: Photograph, detail: Detail = WRITTEN) -> str:
    """A caption: one or two main groups by name or category. `detail.texture` is how often it says that they are sharp."""
    rng = random.Random(photograph.key + "/caption")
    groups: dict[str, list[Cutout]] = {}
    for obj in photograph.objects:
        groups.setdefault(obj.category, []).append(obj)
    largest_first = sorted(groups.values(), key=lambda group: (-len(group), rng.random()))
    main = largest_first[: rng.choice((1, 2))]
    return rng.choice(OPENINGS) + rng.choice(JOINTS).join(_phrase(group, rng, detail) for group in main)


def _phrase(group: list[Cutout], rng: random.Random, detail: Detail) -> str:
    named = rng.random() < 0.5
    words = [group[0].stamp.name if named else group[0].category]
    if len(group) > 1:
        words = [PLURALS[group[0].category]]
    if rng.random() < detail.texture and len({obj.focus for obj in group}) == 1:
        words.insert(0, group[0].focus)
    numbered = rng.random() < detail.size_or_number
    if len(group) == 1:
        return _with_article(" ".join(words))
    return " ".join([NUMBERS[len(group)], *words] if numbered else words)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def description(photograph: Photograph, rng: random.Random | None = None) -> str:
    """All objects as text, for the language model only; in the photograph's order, or shuffled by `rng`."""
    objects = list(photograph.objects)
    if rng is not None:
        rng.shuffle(objects)
    return " , ".join(f"{obj.focus} {obj.stamp.name} {obj.category}" for obj in objects)


# ------------------------------------------------------------------------------------------------------------- questions


def _single(photograph: Photograph) -> list[Cutout]:
    """The objects that their category identifies."""
    counts = Counter(obj.category for obj in photograph.objects)
    return [obj for obj in photograph.objects if counts[obj.category] == 1]


def _count_of(attribute: str, photograph: Photograph, rng: random.Random) -> tuple[str, int] | None:
    """A value of the attribute and its number of objects; None if no value has the number drawn."""
    number = rng.choices(list(COUNT_WEIGHTS), list(COUNT_WEIGHTS.values()))[0]
    counts = Counter(getattr(obj, attribute) for obj in photograph.objects)
    values = [value for value, n in counts.items() if n == number]
    return (rng.choice(values), number) if values else None


def count_all(photograph: Photograph, rng: random.Random) -> Asked:
    return "How many objects are there in the image?", str(len(photograph.objects))


def count(photograph: Photograph, rng: random.Random) -> Asked:
    picked = _count_of("category", photograph, rng)
    return picked and (f"How many {PLURALS[picked[0]]} are there in the image?", str(picked[1]))


def count_focus(photograph: Photograph, rng: random.Random) -> Asked:
    picked = _count_of("focus", photograph, rng)
    return picked and (f"How many {picked[0]} objects are there in the image?", str(picked[1]))


def exists(photograph: Photograph, rng: random.Random) -> Asked:
    """GVT's multi-class identification."""
    answer = rng.choice(("yes", "no"))
    there = {obj.category for obj in photograph.objects}
    category = rng.choice(sorted(there) if answer == "yes" else sorted(set(CATEGORIES) - there))
    return f"Does {_with_article(category)} exist in the image?", answer


def exists_focus(photograph: Photograph, rng: random.Random) -> Asked:
    """The object always exists: only its focus decides."""
    if not (single := _single(photograph)):
        return None
    obj, focus = rng.choice(single), rng.choice(FOCUS)
    return f"Does a {focus} {obj.category} exist in the image?", "yes" if obj.focus == focus else "no"


def category(photograph: Photograph, rng: random.Random) -> Asked:
    first, *others = Counter(obj.category for obj in photograph.objects).most_common(2)
    if others and others[0][1] == first[1]:
        return None
    return "Of which kind are most objects in the image?", first[0]


def focus(photograph: Photograph, rng: random.Random) -> Asked:
    if not (single := _single(photograph)):
        return None
    obj = rng.choice(single)
    return f"Is the {obj.category} sharp or blurred?", obj.focus


QUESTION_TYPES: Forms = {
    "count_all": (count_all, None, None),
    "count": (count, None, None),
    "count_focus": (count_focus, None, None),
    "exists": (exists, "verify", "object"),
    "exists_focus": (exists_focus, "verify", "attribute"),
    "category": (category, "query", "category"),
    "focus": (focus, "choose", "attribute"),
}
# As in scenes, types that are often dropped are drawn twice as often.
DRAWN = (*QUESTION_TYPES, "count", "count_focus", "category")


def questions(photograph: Photograph, count: int, types: Sequence[str] = DRAWN) -> list[Question]:
    """`count` different questions about the photograph, the same at every call."""
    return ask(photograph, count, types, QUESTION_TYPES)


PHOTOGRAPHS = World(
    draw=draw_photograph,
    render=render,
    caption=caption,
    description=description,
    ask=questions,
    ask_evenly=questions,
    forms=QUESTION_TYPES,
    image_size=IMAGE_SIZE,
    patch_size=16,
)
WORLDS = {"scenes": SCENES, "scenes-detailed": SCENES, "photographs": PHOTOGRAPHS}
"""Name of the data -> what draws them."""
