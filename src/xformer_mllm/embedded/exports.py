"""`xformer data export`: the embedded scenes in a benchmark's official files, to try the benchmark without its data.

One function per format; `gqa_export.py` makes GQA's records. File names, folders, keys, types and image names are the
official ones; images, questions, answers and captions are the scenes' own, so that a model trained on scenes can answer
them. (GVT's fixed templates are kept.) Fields that scenes cannot fill are empty, or hold the closest value; the functions
say which.

The second list of a benchmark (VQAv2's test-dev, Karpathy's val, GVT's VCR) is about the next `size` scenes.

Formats: VQAv2 GT-Vision-Lab/VQA (README.md, vqa.py); OK-VQA okvqa.allenai.org, read in google-research/big_vision
datasets/okvqa/okvqa.py; Karpathy & Li's dataset_coco.json and dataset_flickr30k.json; NoCaps nocaps.org/download; GVT
TencentARC/GVT GVTBench/*.json and write_task_from_anno.py.
"""

import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from xformer_mllm.data.questions import Question
from xformer_mllm.embedded.commands import SceneExportConfig
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


def export(config: SceneExportConfig) -> Path:
    """Run `xformer data export` and return the folder, written atomically.

    Raises ValueError if the folder holds anything but the same export.
    """
    about = {key: value for key, value in asdict(config).items() if key != "output_dir"}
    folder = config.output_dir.absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{config.output_dir}: is a file; name a new folder")
    if (folder / EXPORT_FILE).is_file() and read_json(folder / EXPORT_FILE) == about:
        print(f"{config.output_dir}: already there")
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{config.output_dir}: not empty; name a new folder, or delete this one first")
    with atomic_path(folder) as partial:
        partial.mkdir()
        FORMATS[config.name](partial, lambda index: draw_scene(config.split, index, config.seed), config.size)
        _write_json(partial / EXPORT_FILE, about)
    print(f"{config.output_dir}: {config.size:,} scenes as {config.name}")
    return folder


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
    """`count` captions of one scene, its own caption first; they differ as far as its objects allow."""
    return [caption(scene)] + [caption(replace(scene, key=f"{scene.key}/{number}")) for number in range(1, count)]


# ------------------------------------------------------------------------------------------------------ VQAv2, OK-VQA

# The question types of VQA (QuestionTypes/mscoco_question_types.txt) with which questions about scenes begin.
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

    Three of ten annotators write numbers as words.
    """
    questions, annotations = [], []
    for entry, truth in _vqa_questions(folder, "val2014", draw, range(size), 1000):
        questions.append(entry)
        words = [NUMBER_WORDS.get(truth, truth) if person < 3 else truth for person in range(ANNOTATORS)]
        annotations.append(
            {
                "question_type": vqa_question_type(entry["question"]),
                "multiple_choice_answer": truth,
                "answers": [
                    {"answer": word, "answer_confidence": "yes", "answer_id": number}
                    for number, word in enumerate(words, 1)
                ],
                "image_id": entry["image_id"],
                "answer_type": vqa_answer_type(truth),
                "question_id": entry["question_id"],
            }
        )
    _write_vqa(folder / "v2_OpenEnded_mscoco_val2014_questions.json", "val2014", questions=questions)
    _write_vqa(folder / "v2_mscoco_val2014_annotations.json", "val2014", annotations=annotations)
    unanswered = [entry for entry, _ in _vqa_questions(folder, "test2015", draw, range(size, 2 * size), 1000)]
    _write_vqa(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", "test-dev2015", questions=unanswered)


def _vqa_questions(
    folder: Path, part: str, draw: Draw, places: range, ids_per_image: int
) -> Iterator[tuple[dict[str, Any], str]]:
    """Write the images of `places`; yields VQA's entry and the answer of each of their questions."""
    for image_id, scene in _write_images(draw, places, _coco_path(folder, part)):
        for number, asked in enumerate(ask(scene, QUESTIONS_PER_IMAGE)):
            question_id = image_id * ids_per_image + number
            yield {"image_id": image_id, "question": asked.question, "question_id": question_id}, str(asked.answer)


def _coco_path(folder: Path, part: str) -> Callable[[int], Path]:
    """Image id -> file of COCO's `part`, such as val2014."""
    return lambda image_id: folder / part / f"COCO_{part}_{image_id:012d}.jpg"


def _write_vqa(path: Path, part: str, **entries: Any) -> None:
    header = {
        "info": {"description": "The scenes of xformer-mllm in the format of VQA", "version": "2.0"},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": {},
        "data_subtype": part,
    }
    _write_json(path, header | entries)


def vqa_question_type(question: str) -> str:
    """The longest of VQA's question types with which the question begins, or "none of the above"."""
    words = question.lower() + " "
    fitting = [kind for kind in VQA_QUESTION_TYPES if words.startswith(kind + " ")]
    return max(fitting, key=len, default="none of the above")


def vqa_answer_type(answer: str) -> str:
    """VQA's answer type: "yes/no", "number" or "other"."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"


def ok_vqa(folder: Path, draw: Draw, size: int) -> None:
    """Questions and annotations of val2014, which is OK-VQA's test set: each answer raw and stemmed.

    Scenes need no outside knowledge: every question is of the category "other".
    """
    questions, annotations = [], []
    for entry, truth in _vqa_questions(folder, "val2014", draw, range(size), 10):
        questions.append(entry)
        answer = {"raw_answer": truth, "answer_confidence": "yes", "answer": STEMS.get(truth, truth)}
        annotations.append(
            {
                "image_id": entry["image_id"],
                "question_id": entry["question_id"],
                "answer_type": "other",
                "question_type": "other",
                "answers": [{"answer_id": number} | answer for number in range(1, ANNOTATORS + 1)],
                "confidence": 5,
            }
        )
    _write_vqa(folder / "OpenEnded_mscoco_val2014_questions.json", "val2014", questions=questions)
    types = {"annotations": annotations, "question_types": OK_VQA_QUESTION_TYPES}
    _write_vqa(folder / "mscoco_val2014_annotations.json", "val2014", **types)


# ---------------------------------------------------------------------------------------------------------------- GQA


def gqa(folder: Path, draw: Draw, size: int) -> None:
    """testdev_balanced_questions.json, testdev_all_questions.json (with the entailed questions) and the choices.

    GQA does not count, so counting questions are left out. Images have no scene graph: `annotations` are empty, as for
    GQA's questions about whole images. Program and detailed type are the closest that GQA has ("more" and
    "query: ground" are not in GQA).
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
    _karpathy(folder / "dataset_coco.json", "coco", draw, size, _coco_path(folder, "val2014"))


def flickr_retrieval(folder: Path, draw: Draw, size: int) -> None:
    """Karpathy's dataset_flickr30k.json, as `coco_captions`; no folder and no COCO id in its records."""
    path = folder / "flickr30k-images"
    _karpathy(folder / "dataset_flickr30k.json", "flickr30k", draw, size, lambda image_id: path / f"{image_id}.jpg")


def _karpathy(file: Path, dataset: str, draw: Draw, size: int, path: Callable[[int], Path]) -> None:
    images = []
    for image_id, scene in _write_images(draw, range(2 * size), path):
        imgid, image = image_id - 1, path(image_id)
        sentids = list(range(imgid * COCO_CAPTIONS, (imgid + 1) * COCO_CAPTIONS))
        sentences = [
            {"tokens": text.split(), "raw": text, "imgid": imgid, "sentid": sentid}
            for text, sentid in zip(_captions(scene, COCO_CAPTIONS), sentids, strict=True)
        ]
        record: dict[str, Any] = {"filename": image.name}
        if dataset == "coco":
            record = {"filepath": image.parent.name, **record, "cocoid": image_id}
        record |= {"sentids": sentids, "imgid": imgid, "sentences": sentences}
        images.append(record | {"split": "test" if image_id <= size else "val"})
    _write_json(file, {"images": images, "dataset": dataset})


def nocaps(folder: Path, draw: Draw, size: int) -> None:
    """nocaps_val_4500_captions.json, a third of the images for each domain.

    NoCaps calls objects that COCO does not have novel. Here they are those whose colour, shape and texture never occur
    together in training: in-domain images have none of them, out-domain images no others, near-domain images both.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    scenes = {domain: _scenes_of(domain, draw) for domain in DOMAINS}
    for image_id in tqdm(range(size), unit="image"):
        domain = DOMAINS[image_id % len(DOMAINS)]
        scene = next(scenes[domain])
        open_images_id = f"{image_id:016x}"
        _write_image(scene, folder / "images" / f"{open_images_id}.jpg")
        images.append(
            {
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
        )
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
    return (scene for scene in map(draw, itertools.count()) if _domain(scene) == domain)


def _domain(scene: Scene) -> str:
    novel = [(obj.colour, obj.shape, obj.texture) in HELD_OUT for obj in scene.objects]
    return "out-domain" if all(novel) else "near-domain" if any(novel) else "in-domain"


# ---------------------------------------------------------------------------------------------------------------- GVT


def gvt_counting(folder: Path, draw: Draw, size: int) -> None:
    """coco_oc.json and vcr_oc.json: how many objects of a shape; small numbers are the most frequent, as in GVT."""
    _gvt_lists(folder, "oc", _count_question, draw, size)


def gvt_identification(folder: Path, draw: Draw, size: int) -> None:
    """coco_mci.json and vcr_mci.json: does an object exist; half of the answers are "Yes.".

    GVT's VCR list leaks its answers; this one does not.
    """
    _gvt_lists(folder, "mci", _identification_question, draw, size)


def _gvt_lists(
    folder: Path, task: str, question_of: Callable[[Scene], tuple[str, str]], draw: Draw, size: int
) -> None:
    """One question per image. The id of an image is a number in COCO's list, its path inside vcr1images in VCR's."""

    def write(name: str, scenes: Iterator[tuple[Any, Scene]]) -> None:
        entries = []
        for image_id, scene in scenes:
            text_in, text_out = question_of(scene)
            entry = {"image_id": image_id, "text_in": text_in, "text_out": text_out}
            entries.append(entry | {"n_obj_exist": len(scene.objects)})
        _write_json(folder / f"{name}_{task}.json", entries)

    def vcr_name(image_id: int) -> str:
        return f"movieclips_Scenes/{image_id:011d}@0.jpg"

    write("coco", _write_images(draw, range(size), lambda number: folder / "val2017" / f"{number:012d}.jpg"))
    vcr = _write_images(draw, range(size, 2 * size), lambda number: folder / "vcr1images" / vcr_name(number))
    write("vcr", ((vcr_name(image_id), scene) for image_id, scene in vcr))


def _count_question(scene: Scene) -> tuple[str, str]:
    shapes = Counter(obj.shape for obj in scene.objects)
    shape = random.Random(scene.key + "/gvt").choice(sorted(shapes))
    return f"How many {PLURALS[shape]} are there in the image?", str(shapes[shape])


def _identification_question(scene: Scene) -> tuple[str, str]:
    rng = random.Random(scene.key + "/gvt")
    present = sorted({name(obj) for obj in scene.objects})
    absent = [words for colour in COLOURS for shape in SHAPES if (words := f"{colour} {shape}") not in present]
    answer = rng.choice(("Yes.", "No."))
    return f"Does {rng.choice(present if answer == 'Yes.' else absent)} exist in the image?", answer


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
