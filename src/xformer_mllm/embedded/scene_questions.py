"""Questions about scenes of the embedded world, and their answers.

Most question types draw the answer first (uniformly, or by weights if scenes do not offer all answers equally often)
and then choose an object for which it is true. Shapes, colours and textures are exchangeable, so the words of a
question do not reveal its answer; tests/test_scenes.py checks this with question-only baselines. A question about one
object is asked only if its words identify the object.

Sources of the wording: counting and existence as in GVT's OC and MCI sets ("How many ... are there in the image?",
"Does ... exist in the image?"); structural and semantic types as in GQA.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from typing import Any

from xformer_mllm.data.questions import Question
from xformer_mllm.embedded.world import COLOURS, SHAPES, TEXTURES, Scene, SceneObject

PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}

# Small counts are more frequent in scenes, so the count is drawn with these weights, and the question is dropped if
# the scene has no such count: this balances the answers.
COUNT_WEIGHTS = {1: 0.32, 2: 0.46, 3: 0.78, 4: 1.4}

_COLOUR_NAMES = tuple(COLOURS)
Asked = tuple[str, str] | None  # question and answer; None if the scene does not allow the question
Forms = Mapping[str, tuple[Callable[[Any, random.Random], Asked], str | None, str | None]]
"""Question type -> its generator, GQA's structural type, GQA's semantic type."""


def name(obj: SceneObject) -> str:
    """Colour and shape, the name of an object in questions: "red circle"."""
    return f"{obj.colour} {obj.shape}"


def _single(scene: Scene) -> list[SceneObject]:
    """The objects that colour and shape identify."""
    counts = Counter((obj.colour, obj.shape) for obj in scene.objects)
    return [obj for obj in scene.objects if counts[obj.colour, obj.shape] == 1]


def _single_by(scene: Scene, attribute: str) -> list[SceneObject]:
    counts = Counter(getattr(obj, attribute) for obj in scene.objects)
    return [obj for obj in scene.objects if counts[getattr(obj, attribute)] == 1]


def _absent(scene: Scene, rng: random.Random) -> str:
    """A colour and shape that no object has."""
    there = {name(obj) for obj in scene.objects}
    while (words := f"{rng.choice(_COLOUR_NAMES)} {rng.choice(SHAPES)}") in there:
        pass
    return words


def _present(scene: Scene, rng: random.Random) -> str:
    return rng.choice(sorted({name(obj) for obj in scene.objects}))


def _count_of(attribute: str, scene: Scene, rng: random.Random) -> tuple[str, int] | None:
    """A value of the attribute and its number of objects; None if no value has the number drawn."""
    number = rng.choices(list(COUNT_WEIGHTS), list(COUNT_WEIGHTS.values()))[0]
    counts = Counter(getattr(obj, attribute) for obj in scene.objects)
    values = [value for value, n in counts.items() if n == number]
    return (rng.choice(values), number) if values else None


def count_all(scene: Scene, rng: random.Random) -> Asked:
    return "How many objects are there in the image?", str(len(scene.objects))


def count(scene: Scene, rng: random.Random) -> Asked:
    picked = _count_of("shape", scene, rng)
    return picked and (f"How many {PLURALS[picked[0]]} are there in the image?", str(picked[1]))


def count_texture(scene: Scene, rng: random.Random) -> Asked:
    picked = _count_of("texture", scene, rng)
    return picked and (f"How many {picked[0]} objects are there in the image?", str(picked[1]))


def exists(scene: Scene, rng: random.Random) -> Asked:
    answer = rng.choice(("yes", "no"))
    words = _present(scene, rng) if answer == "yes" else _absent(scene, rng)
    return f"Does a {words} exist in the image?", answer


def exists_texture(scene: Scene, rng: random.Random) -> Asked:
    """The object always exists: only its texture decides."""
    if not (single := _single(scene)):
        return None
    obj = rng.choice(single)
    answer = rng.choice(("yes", "no"))
    texture = obj.texture if answer == "yes" else rng.choice([t for t in TEXTURES if t != obj.texture])
    return f"Does a {texture} {name(obj)} exist in the image?", answer


def texture(scene: Scene, rng: random.Random) -> Asked:
    if not (single := _single(scene)):
        return None
    obj = rng.choice(single)
    return f"What texture does the {name(obj)} have?", obj.texture


def colour(scene: Scene, rng: random.Random) -> Asked:
    if not (single := _single_by(scene, "shape")):
        return None
    obj = rng.choice(single)
    return f"What colour is the {obj.shape}?", obj.colour


def shape(scene: Scene, rng: random.Random) -> Asked:
    if not (single := _single_by(scene, "colour")):
        return None
    obj = rng.choice(single)
    return f"What shape is the {obj.colour} object?", obj.shape


def size(scene: Scene, rng: random.Random) -> Asked:
    if not (single := _single(scene)):
        return None
    obj = rng.choice(single)
    return f"Is the {name(obj)} small or large?", obj.size


def left_right(scene: Scene, rng: random.Random) -> Asked:
    pairs = [(a, b) for a, b in permutations(_single(scene), 2) if a.column != b.column]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return f"Is the {name(a)} left or right of the {name(b)}?", "left" if a.column < b.column else "right"


def above(scene: Scene, rng: random.Random) -> Asked:
    pairs = [(a, b) for a, b in permutations(_single(scene), 2) if a.row != b.row]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return f"Is the {name(a)} above the {name(b)}?", "yes" if a.row < b.row else "no"


def compare(scene: Scene, rng: random.Random) -> Asked:
    counts = Counter(obj.shape for obj in scene.objects)
    pairs = [(a, b) for a, b in permutations(sorted(counts), 2) if counts[a] != counts[b]]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return f"Are there more {PLURALS[a]} than {PLURALS[b]}?", "yes" if counts[a] > counts[b] else "no"


def compare_texture(scene: Scene, rng: random.Random) -> Asked:
    # Two textures differ more often than not: "yes" is drawn more often, and dropped if no pair matches.
    answer = rng.choices(("yes", "no"), (0.6, 0.4))[0]
    pairs = [(a, b) for a, b in permutations(_single(scene), 2) if (a.texture == b.texture) == (answer == "yes")]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return f"Do the {name(a)} and the {name(b)} have the same texture?", answer


def logical(scene: Scene, rng: random.Random) -> Asked:
    """ "and" needs both, "or" one of two; both answers are equally likely for each word."""
    names = sorted({name(obj) for obj in scene.objects})
    word = rng.choice(("and", "or")) if len(names) > 1 else "or"  # one name cannot make "and" true
    answer = rng.choice(("yes", "no"))
    if word == "and" and answer == "yes":
        words = rng.sample(names, 2)
    elif word == "or" and answer == "no":
        words = [_absent(scene, rng), _absent(scene, rng)]
    else:
        words = [rng.choice(names), _absent(scene, rng)]
        rng.shuffle(words)
    if words[0] == words[1]:
        return None
    return f"Is there a {words[0]} {word} a {words[1]} in the image?", answer


def ground(scene: Scene, rng: random.Random) -> Asked:
    return "What is the ground like?", scene.ground


QUESTION_TYPES: Forms = {
    "count_all": (count_all, None, None),
    "count": (count, None, None),
    "count_texture": (count_texture, None, None),
    "exists": (exists, "verify", "object"),
    "exists_texture": (exists_texture, "verify", "attribute"),
    "texture": (texture, "query", "attribute"),
    "colour": (colour, "query", "attribute"),
    "shape": (shape, "query", "category"),
    "size": (size, "choose", "attribute"),
    "left_right": (left_right, "choose", "relation"),
    "above": (above, "verify", "relation"),
    "compare": (compare, "compare", "object"),
    "compare_texture": (compare_texture, "compare", "attribute"),
    "logical": (logical, "logical", "object"),
    "ground": (ground, "query", "global"),
}
# Counts are drawn twice as often, since they are often dropped.
EVENLY = (*QUESTION_TYPES, "count", "count_texture")
DETAIL = (*EVENLY, *3 * ("texture", "exists_texture", "count_texture"), "size")
"""Types as often as `ask` draws them. The tiny language model learned from `EVENLY`. Every other question is drawn from
`DETAIL`, so that a third asks for a texture: docs/decisions/embedded-world.md."""


def ask(scene: Any, count: int, types: Sequence[str] = DETAIL, forms: Forms = QUESTION_TYPES) -> list[Question]:
    """`count` different questions about the scene, the same at every call.

    Their types differ as long as the scene allows more types; then types repeat.
    """
    rng = random.Random(scene.key + "/questions")
    asked: dict[str, Question] = {}
    while True:
        drawn: set[str] = set()
        for question_type in rng.sample(types, len(types)):
            form, structural, semantic = forms[question_type]
            if question_type in drawn or not (pair := form(scene, rng)) or pair[0] in asked:
                continue
            drawn.add(question_type)
            identity = f"{scene.key}/{len(asked)}"
            asked[pair[0]] = Question(identity, scene.key, *pair, question_type, structural, semantic)
            if len(asked) == count:
                return list(asked.values())
