"""`xformer data export`: the embedded scenes in the official files of a benchmark, so that it can be tried without its data.

One function per format; what GQA's files say about a question is made in `gqa_export.py`. File names, folders, keys, types
and the names of images are the official ones; images, questions, answers and captions are the scenes' own, so that a
model that was trained on scenes can answer them. (GVT has templates instead of questions, and keeps them.) What a format
asks for and scenes do not have is left empty as the format leaves it empty, or is the nearest thing there is; the
functions say where.

Where a benchmark has a second list (VQAv2's test-dev, Karpathy's val, GVT's VCR), it is about the next `size` scenes.

Formats: VQAv2 GT-Vision-Lab/VQA (README.md, vqa.py); OK-VQA okvqa.allenai.org, read in google-research/big_vision
datasets/okvqa/okvqa.py; Karpathy & Li's dataset_coco.json and dataset_flickr30k.json; NoCaps nocaps.org/download; GVT
TencentARC/GVT GVTBench/*.json and write_task_from_anno.py.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from PIL import Image
from tqdm.auto import tqdm

from xformer_mllm.data.questions import Question
from xformer_mllm.embedded.gqa_export import gqa_choices, gqa_entries, gqa_look
from xformer_mllm.embedded.scene_questions import PLURALS, ask, name
from xformer_mllm.embedded.scenes import caption
from xformer_mllm.embedded.world import COLOURS, HELD_OUT, IMAGE_SIZE, SHAPES, Scene, draw_scene, render
from xformer_mllm.evaluate.benchmark import EXPORT_FILE
from xformer_mllm.files import atomic_path, read_json, write_whole

QUESTIONS_PER_IMAGE = 4
ANNOTATORS = 10
COCO_CAPTIONS = 5
NOCAPS_CAPTIONS = 10
DOMAINS = ("in-domain", "near-domain", "out-domain")

JPEG_QUALITY = 100  # less would lose a scene's textures, which are 4 pixels wide and close to the noise

Draw = Callable[[int], Scene]
Name = Literal[
    "vqav2",
    "ok-vqa",
    "gqa",
    "coco-captions",
    "nocaps",
    "gvt-counting",
    "gvt-identification",
    "coco-retrieval",
    "flickr-retrieval",
]


@dataclass(frozen=True, kw_only=True)
class SceneExportConfig:
    """The embedded scenes in a benchmark's official files, so that the benchmark can be tried without its data."""

    name: Annotated[Name, tyro.conf.Positional]
    """The benchmark; easy-vqa and scenes need no files."""
    output_dir: Path
    """A new or empty folder; written atomically."""
    size: int = 200
    """Number of scenes (a second list of the benchmark has as many)."""
    seed: int = 0
    """Seed of the scenes."""
    split: Literal["validation", "test"] = "test"
    """Split of the held-out scenes."""

    def __post_init__(self) -> None:
        """Raises ValueError for an invalid size."""
        if self.size < 1:
            raise ValueError(f"--size must be at least 1, not {self.size}")


def export(config: SceneExportConfig) -> Path:
    """Run `xformer data export` and return the folder, which is there whole or not at all.

    Raises ValueError if the folder holds anything but the same export.
    """
    about = {"name": config.name, "size": config.size, "seed": config.seed, "split": config.split}
    folder = config.output_dir.absolute()
    if _is_there(folder, about):
        print(f"{folder}: already there")
        return folder
    with atomic_path(folder) as partial:
        partial.mkdir()
        FORMATS[config.name](partial, lambda index: draw_scene(config.split, index, config.seed), config.size)
        _write_json(partial / EXPORT_FILE, about)
    print(f"{folder}: {config.size:,} scenes as {config.name}")
    return folder


def _is_there(folder: Path, about: dict[str, Any]) -> bool:
    """Whether the folder holds this export already. Raises ValueError if it holds something else."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; name a new folder")
    file = folder / EXPORT_FILE
    if file.is_file() and read_json(file) == about:
        return True
    if any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; name a new folder, or delete this one first")
    return False


# --------------------------------------------------------------------------------------------------- what formats share


def _write_images(draw: Draw, places: range, path: Callable[[int], Path]) -> Iterator[tuple[int, Scene]]:
    """Write the image of each scene at `places` to path(image id); yields (image id, scene). Ids count from 1."""
    for place in tqdm(places, unit="image"):
        scene = draw(place)
        _write_image(scene, path(place + 1))
        yield place + 1, scene


def _write_image(scene: Scene, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render(scene)).save(path, quality=JPEG_QUALITY, subsampling=0)


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value) + "\n")


def _captions(scene: Scene, count: int) -> list[str]:
    """`count` captions of one scene, the scene's own first; they differ as far as its objects allow."""
    return [caption(scene)] + [caption(replace(scene, key=f"{scene.key}/{number}")) for number in range(1, count)]


# ------------------------------------------------------------------------------------------------------ VQAv2, OK-VQA

# Those of VQA's question types (QuestionTypes/mscoco_question_types.txt) that a scene's question can begin with; the
# longest that fits is a question's type.
VQA_QUESTION_TYPES = ("how many", "what is the", "what", "is there a", "is the", "are there", "do")
NUMBER_WORDS = {"1": "one", "2": "two", "3": "three", "4": "four", "5": "five", "6": "six"}

# OK-VQA's `answer` is its `raw_answer` stemmed.
STEMS = {"striped": "stripe", "checked": "check"}
OK_VQA_QUESTION_TYPES = {
    "one": "Vehicles and Transportation",
    "two": "Brands, Companies and Products",
    "three": "Objects, Material and Clothing",
    "four": "Sports and Recreation",
    "five": "Cooking and Food",
    "six": "Geography, History, Language and Culture",
    "seven": "People and Everyday life",
    "eight": "Plants and Animals",
    "nine": "Science and Technology",
    "ten": "Weather and Climate",
    "other": "Other",
}


def vqav2(folder: Path, draw: Draw, size: int) -> None:
    """Questions and annotations of val2014, and the questions of test-dev2015, which has no answers.

    Of ten annotators three write numbers in words.
    """
    questions, annotations = [], []
    for image_id, scene in _write_images(draw, range(size), _coco_path(folder, "val2014")):
        for number, asked in enumerate(ask(scene, QUESTIONS_PER_IMAGE)):
            entry = {"image_id": image_id, "question": asked.question, "question_id": image_id * 1000 + number}
            questions.append(entry)
            annotations.append(_vqa_annotation(entry, asked))
    _write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", _vqa_file("val2014", questions=questions))
    _write_json(folder / "v2_mscoco_val2014_annotations.json", _vqa_file("val2014", annotations=annotations))
    unanswered = [
        {"image_id": image_id, "question": asked.question, "question_id": image_id * 1000 + number}
        for image_id, scene in _write_images(draw, range(size, 2 * size), _coco_path(folder, "test2015"))
        for number, asked in enumerate(ask(scene, QUESTIONS_PER_IMAGE))
    ]
    file = _vqa_file("test-dev2015", questions=unanswered)
    _write_json(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", file)


def _coco_path(folder: Path, part: str) -> Callable[[int], Path]:
    """part: val2014, test2015, ..."""
    return lambda image_id: folder / part / f"COCO_{part}_{image_id:012d}.jpg"


def _vqa_file(part: str, **entries: Any) -> dict[str, Any]:
    return {
        "info": {"description": "The scenes of xformer-mllm in the format of VQA", "version": "2.0"},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": {},
        "data_subtype": part,
        **entries,
    }


def _vqa_annotation(entry: dict[str, Any], asked: Question) -> dict[str, Any]:
    truth = str(asked.answer)
    words = [NUMBER_WORDS.get(truth, truth) if person < 3 else truth for person in range(ANNOTATORS)]
    return {
        "question_type": vqa_question_type(asked.question),
        "multiple_choice_answer": truth,
        "answers": [
            {"answer": word, "answer_confidence": "yes", "answer_id": number} for number, word in enumerate(words, 1)
        ],
        "image_id": entry["image_id"],
        "answer_type": vqa_answer_type(truth),
        "question_id": entry["question_id"],
    }


def vqa_question_type(question: str) -> str:
    """VQA's: the longest of its types that the question begins with, "none of the above" if there is none."""
    words = question.lower() + " "
    fitting = [kind for kind in VQA_QUESTION_TYPES if words.startswith(kind + " ")]
    return max(fitting, key=len, default="none of the above")


def vqa_answer_type(answer: str) -> str:
    """VQA's: "yes/no", "number" or "other"."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"


def ok_vqa(folder: Path, draw: Draw, size: int) -> None:
    """Questions and annotations of val2014, which is OK-VQA's test set: each answer raw and stemmed.

    Scenes need no outside knowledge: every question is of the category "other".
    """
    questions, annotations = [], []
    for image_id, scene in _write_images(draw, range(size), _coco_path(folder, "val2014")):
        for number, asked in enumerate(ask(scene, QUESTIONS_PER_IMAGE)):
            ids = {"image_id": image_id, "question_id": image_id * 10 + number}
            questions.append({"image_id": image_id, "question": asked.question, "question_id": ids["question_id"]})
            annotations.append(ids | _ok_vqa_annotation(str(asked.answer)))
    file = _vqa_file("val2014", questions=questions)
    _write_json(folder / "OpenEnded_mscoco_val2014_questions.json", file)
    file = _vqa_file("val2014", annotations=annotations, question_types=OK_VQA_QUESTION_TYPES)
    _write_json(folder / "mscoco_val2014_annotations.json", file)


def _ok_vqa_annotation(truth: str) -> dict[str, Any]:
    answers = [
        {"answer_id": number, "raw_answer": truth, "answer_confidence": "yes", "answer": STEMS.get(truth, truth)}
        for number in range(1, ANNOTATORS + 1)
    ]
    return {"answer_type": "other", "question_type": "other", "answers": answers, "confidence": 5}


# ---------------------------------------------------------------------------------------------------------------- GQA


def gqa(folder: Path, draw: Draw, size: int) -> None:
    """testdev_balanced_questions.json, testdev_all_questions.json (with the entailed questions) and the choices.

    GQA does not count, so counting is left out. Images have no scene graph: `annotations` are empty, as they are for
    GQA's questions about whole scenes. Program and detailed type of a question are as near to GQA's as scenes come ("more"
    and "query: ground" are not in GQA).
    """
    every: dict[str, dict[str, Any]] = {}
    asked_by_id: dict[str, Question] = {}
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for image_id, scene in _write_images(draw, range(size), lambda number: folder / "images" / f"n{number}.jpg"):
        gqa_look(scene, seen)
        for question_id, question, entry in gqa_entries(scene, image_id, QUESTIONS_PER_IMAGE):
            every[question_id] = entry
            asked_by_id[question_id] = question
    balanced = {question_id: entry for question_id, entry in every.items() if entry["isBalanced"]}
    choices = {question_id: gqa_choices(question, seen) for question_id, question in asked_by_id.items()}
    _write_json(folder / "testdev_balanced_questions.json", balanced)
    _write_json(folder / "testdev_all_questions.json", every)
    _write_json(folder / "testdev_choices.json", choices)


# -------------------------------------------------------------------------------------------------- captions, retrieval


def coco_captions(folder: Path, draw: Draw, size: int) -> None:
    """Karpathy's dataset_coco.json: the scenes as its test split, and the next ones as its val split."""
    images = []
    for image_id, scene in _write_images(draw, range(2 * size), _coco_path(folder, "val2014")):
        split = "test" if image_id <= size else "val"
        record = {"filepath": "val2014", "filename": _coco_path(folder, "val2014")(image_id).name, "cocoid": image_id}
        images.append(record | _karpathy_record(scene, image_id - 1, split))
    _write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def flickr_retrieval(folder: Path, draw: Draw, size: int) -> None:
    """Karpathy's dataset_flickr30k.json, as `coco_captions`; no folder and no COCO id in its records."""
    images = []
    for image_id, scene in _write_images(
        draw, range(2 * size), lambda number: folder / "flickr30k-images" / f"{number}.jpg"
    ):
        split = "test" if image_id <= size else "val"
        images.append({"filename": f"{image_id}.jpg"} | _karpathy_record(scene, image_id - 1, split))
    _write_json(folder / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def _karpathy_record(scene: Scene, imgid: int, split: str) -> dict[str, Any]:
    sentids = list(range(imgid * COCO_CAPTIONS, (imgid + 1) * COCO_CAPTIONS))
    sentences = [
        {"tokens": text.split(), "raw": text, "imgid": imgid, "sentid": sentid}
        for text, sentid in zip(_captions(scene, COCO_CAPTIONS), sentids, strict=True)
    ]
    return {"sentids": sentids, "imgid": imgid, "sentences": sentences, "split": split}


def nocaps(folder: Path, draw: Draw, size: int) -> None:
    """nocaps_val_4500_captions.json, a third of the images for each domain.

    A novel object, as NoCaps calls what COCO does not have, is one whose colour, shape and texture never occur together
    in training scenes: in-domain images have none, out-domain ones nothing else, near-domain ones both.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    streams = {domain: _scenes_of(domain, draw) for domain in DOMAINS}
    for image_id in tqdm(range(size), unit="image"):
        domain = DOMAINS[image_id % len(DOMAINS)]
        scene = next(streams[domain])
        open_images_id = f"{image_id:016x}"
        _write_image(scene, folder / "images" / f"{open_images_id}.jpg")
        images.append(_nocaps_image(image_id, open_images_id, domain))
        for text in _captions(scene, NOCAPS_CAPTIONS):
            annotations.append({"image_id": image_id, "id": len(annotations), "caption": text})
    info = {
        "url": "http://nocaps.org",
        "version": "0.1",
        "description": "The scenes of xformer-mllm in nocaps' format",
    }
    file = {"licenses": [], "info": info, "images": images, "annotations": annotations}
    _write_json(folder / "nocaps_val_4500_captions.json", file)


def _scenes_of(domain: str, draw: Draw) -> Iterator[Scene]:
    index = 0
    while True:
        if _domain(scene := draw(index)) == domain:
            yield scene
        index += 1


def _domain(scene: Scene) -> str:
    novel = [(thing.colour, thing.shape, thing.texture) in HELD_OUT for thing in scene.objects]
    return "out-domain" if all(novel) else "near-domain" if any(novel) else "in-domain"


def _nocaps_image(image_id: int, open_images_id: str, domain: str) -> dict[str, Any]:
    return {
        "id": image_id,
        "open_images_id": open_images_id,
        "height": IMAGE_SIZE,
        "width": IMAGE_SIZE,
        "coco_url": "",
        "file_name": f"{open_images_id}.jpg",
        "license": 0,
        "date_captured": "",
        "domain": domain,
    }


# ---------------------------------------------------------------------------------------------------------------- GVT


def gvt_counting(folder: Path, draw: Draw, size: int) -> None:
    """coco_oc.json and vcr_oc.json: how many objects of a shape; small numbers are the most frequent, as in GVT."""
    _gvt_lists(folder, "oc", _counted, draw, size)


def gvt_identification(folder: Path, draw: Draw, size: int) -> None:
    """coco_mci.json and vcr_mci.json: is there such a thing; half the answers are "Yes." GVT's leak in VCR is not copied."""
    _gvt_lists(folder, "mci", _identified, draw, size)


def _gvt_lists(
    folder: Path, task: str, question_of: Callable[[Scene], tuple[str, str]], draw: Draw, size: int
) -> None:
    """One question an image. COCO's images have numbers, VCR's a path inside vcr1images."""
    coco = [
        {"image_id": image_id} | _gvt_entry(scene, question_of)
        for image_id, scene in _write_images(
            draw, range(size), lambda number: folder / "val2017" / f"{number:012d}.jpg"
        )
    ]
    _write_json(folder / f"coco_{task}.json", coco)
    vcr = [
        {"image_id": _vcr_name(image_id)} | _gvt_entry(scene, question_of)
        for image_id, scene in _write_images(
            draw, range(size, 2 * size), lambda number: folder / "vcr1images" / _vcr_name(number)
        )
    ]
    _write_json(folder / f"vcr_{task}.json", vcr)


def _vcr_name(image_id: int) -> str:
    return f"movieclips_Scenes/{image_id:011d}@0.jpg"


def _gvt_entry(scene: Scene, question_of: Callable[[Scene], tuple[str, str]]) -> dict[str, Any]:
    text_in, text_out = question_of(scene)
    return {"text_in": text_in, "text_out": text_out, "n_obj_exist": len(scene.objects)}


def _counted(scene: Scene) -> tuple[str, str]:
    shapes = Counter(thing.shape for thing in scene.objects)
    shape = random.Random(scene.key + "/gvt").choice(sorted(shapes))
    return f"How many {PLURALS[shape]} are there in the image?", str(shapes[shape])


def _identified(scene: Scene) -> tuple[str, str]:
    rng = random.Random(scene.key + "/gvt")
    there = sorted({name(thing) for thing in scene.objects})
    absent = [thing for thing in _every_name() if thing not in there]
    answer = rng.choice(("Yes.", "No."))
    return f"Does {rng.choice(there if answer == 'Yes.' else absent)} exist in the image?", answer


def _every_name() -> Iterable[str]:
    return (f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


FORMATS: dict[str, Callable[[Path, Draw, int], None]] = {
    "vqav2": vqav2,
    "ok-vqa": ok_vqa,
    "gqa": gqa,
    "coco-captions": coco_captions,
    "nocaps": nocaps,
    "gvt-counting": gvt_counting,
    "gvt-identification": gvt_identification,
    "coco-retrieval": coco_captions,
    "flickr-retrieval": flickr_retrieval,
}
