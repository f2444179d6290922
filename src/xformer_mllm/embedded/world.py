"""The embedded world: scenes, their random generation and rendering.

A scene has one to six objects on a jittered 3x3 grid over a patterned, noisy ground, 48x48 pixels. It is determined by
(seed, split, index) through ``random.Random``, so any scene can be generated alone, in any order, on any machine.

Textures are the fine detail: they share their mean colour, stripes and checks share their contrast, phase and direction
are random, and the contrast is close to the noise. Pooled colour or brightness does not reveal them.
docs/decisions/embedded-world.md explains how these values were chosen.
"""

import random
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 48
GRID = 3
CELL = IMAGE_SIZE // GRID

SPLITS = ("train", "validation", "test")
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (200, 65, 60),
    "green": (65, 165, 70),
    "blue": (65, 95, 200),
    "yellow": (205, 195, 65),
    "purple": (150, 65, 180),
    "teal": (60, 180, 185),
}
SIZES = {"small": 11, "large": 14}  # pixels across
TEXTURES = ("solid", "striped", "checked")
GROUNDS = ("smooth", "rough", "wavy")

TEXTURE_CONTRAST = 36.0  # grey levels above and below the object's colour
GROUND_CONTRAST = 8.0
NOISE = 20.0  # maximum of the uniform pixel noise, in grey levels
PERIOD = 4  # pixels, of stripes and checks

# One combination of shape and texture per colour never occurs in training; validation and test include it.
HELD_OUT = frozenset(
    (colour, SHAPES[i % len(SHAPES)], TEXTURES[i % len(TEXTURES)]) for i, colour in enumerate(COLOURS)
)

_COLOUR_NAMES = tuple(COLOURS)
_SIZE_NAMES = tuple(SIZES)
_ROWS, _COLUMNS = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object: four attributes and its cell (row and column, from the top left)."""

    shape: str
    colour: str
    size: str
    texture: str
    row: int
    column: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene: `key` ("seed/split/index") identifies it and seeds its image, caption and questions."""

    key: str
    objects: tuple[SceneObject, ...]
    ground: str


def draw_scene(split: str, index: int, seed: int = 0) -> Scene:
    """The scene at `index` of `split`. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    key = f"{seed}/{split}/{index}"
    rng = random.Random(key)
    count = rng.randint(1, 6)
    cells = rng.sample(range(GRID * GRID), count)
    objects: list[SceneObject] = []
    while len(objects) < count:
        # Objects come in groups of one colour and shape, so that captions can say "two red circles".
        shape, colour = rng.choice(SHAPES), rng.choice(_COLOUR_NAMES)
        for _ in range(min(rng.choice((1, 1, 1, 2, 2, 3)), count - len(objects))):
            texture = rng.choice(TEXTURES)
            while split == "train" and (colour, shape, texture) in HELD_OUT:
                texture = rng.choice(TEXTURES)
            row, column = divmod(cells[len(objects)], GRID)
            objects.append(SceneObject(shape, colour, rng.choice(_SIZE_NAMES), texture, row, column))
    return Scene(key, tuple(objects), rng.choice(GROUNDS))


def render(scene: Scene) -> np.ndarray:
    """The scene as uint8[48, 48, 3], RGB."""
    rng = random.Random(scene.key + "/render")
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    image[:] = [rng.uniform(95, 150)] * 3
    image += [rng.uniform(-12, 12) for _ in range(3)]
    image += _ground(scene.ground, rng)[:, :, None]
    for obj in scene.objects:
        _draw_object(image, obj, rng)
    noise = np.frombuffer(rng.randbytes(image.size), np.uint8).reshape(image.shape)
    image += noise * np.float32(2 * NOISE / 255) - np.float32(NOISE)
    return np.clip(image, 0, 255).astype(np.uint8)


def _ground(kind: str, rng: random.Random) -> np.ndarray:
    """float32[48, 48] with mean near zero: a gradient (smooth), blotches (rough) or waves (wavy)."""
    if kind == "rough":
        blotches = np.frombuffer(rng.randbytes(24 * 24), np.uint8).reshape(24, 24)
        field = blotches * np.float32(2 / 255) - 1
        return field.repeat(2, 0).repeat(2, 1) * np.float32(GROUND_CONTRAST)
    angle, phase = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi)
    across = np.float32(np.cos(angle)) * _COLUMNS + np.float32(np.sin(angle)) * _ROWS
    if kind == "wavy":
        return np.sin(across * np.float32(2 * np.pi / rng.uniform(7, 11)) + np.float32(phase)) * np.float32(
            GROUND_CONTRAST
        )
    return (across - across.mean()) * np.float32(GROUND_CONTRAST / IMAGE_SIZE)


def _draw_object(image: np.ndarray, obj: SceneObject, rng: random.Random) -> None:
    """Draw one object into `image`, float32[48, 48, 3], in place."""
    size = SIZES[obj.size]
    slack = CELL - size
    top = obj.row * CELL + rng.randint(0, slack)
    left = obj.column * CELL + rng.randint(0, slack)
    colour = np.array([level + rng.uniform(-15, 15) for level in COLOURS[obj.colour]], np.float32)
    pattern = rng.choice(_PATTERNS[obj.texture])
    up, aside = rng.randrange(PERIOD), rng.randrange(PERIOD)
    surface = colour + pattern[up : up + size, aside : aside + size, None]
    area = image[top : top + size, left : left + size]
    area += _MASKS[obj.shape, size] * (surface - area)


def _mask(shape: str, size: int) -> np.ndarray:
    """float32[size, size, 1]: the covered fraction of each pixel, from 4x4 samples per pixel."""
    samples = (np.arange(size * 4) + 0.5) / (size * 4) * 2 - 1  # -1 .. 1 across the shape
    y, x = np.meshgrid(samples, samples, indexing="ij")
    inside = {
        "circle": x**2 + y**2 <= 1,
        "square": np.maximum(abs(x), abs(y)) <= 0.88,
        "triangle": abs(x) <= (y + 1) / 2,
        "cross": (np.minimum(abs(x), abs(y)) <= 0.38),
    }[shape]
    return inside.reshape(size, 4, size, 4).mean((1, 3), dtype=np.float32)[:, :, None]


def _patterns() -> dict[str, list[np.ndarray]]:
    """Texture -> its directions, each float32[extent, extent] in grey levels, large enough for any phase."""
    extent = max(SIZES.values()) + PERIOD
    wave = np.where(np.arange(extent) % PERIOD < PERIOD // 2, 1, -1) * np.float32(TEXTURE_CONTRAST)
    stripes = np.tile(wave.astype(np.float32), (extent, 1))
    checks = stripes * np.sign(stripes.T)
    return {"solid": [np.zeros_like(stripes)], "striped": [stripes, stripes.T], "checked": [checks]}


_MASKS = {(shape, size): _mask(shape, size) for shape in SHAPES for size in SIZES.values()}
_PATTERNS = _patterns()
