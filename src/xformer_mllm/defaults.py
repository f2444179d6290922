"""What the commands take when nothing else is named: the embedded world's data, encoders and language model.

This is the one module outside `embedded/` that knows it; each part is imported when it is asked for.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from xformer_mllm.model.configuration_xformer import XFormerConfig

OPT = Path(__file__).parent / "embedded" / "weights" / "opt"
"""The shipped language model."""


MODELS = ("xformer", "qformer", "xformer-stage1")
"""The trained models that ship with the package."""


def shipped_model(name: str = "xformer") -> Path:
    """Folder of a model trained on the embedded scenes, for `from_pretrained`.

    Args:
        name: "xformer" or "qformer", which answer questions (stage 2), or "xformer-stage1", which captions and
            reconstructs.

    Raises:
        ValueError: for any other name.
    """
    if name not in MODELS:
        raise ValueError(f"no shipped model {name!r}; choose one of {', '.join(MODELS)}")
    return Path(__file__).parent / "embedded" / "models" / name


def example_images() -> list[Path]:
    """Two held-out scenes to try a model on, PNG files of 48x48 pixels."""
    return sorted((Path(__file__).parent / "embedded" / "examples").glob("*.png"))


def config(encoders: Path | None = None) -> XFormerConfig:
    """X-Former of the shipped encoders' sizes, or of those in another folder, before any variant."""
    from xformer_mllm.embedded.start import WEIGHTS, embedded_config

    return embedded_config(encoders or WEIGHTS)


def start_pretraining(
    variant: str,
    seed: int,
    second_encoder: str | None = None,
    settings: Sequence[str] = (),
    encoders: Path | None = None,
) -> tuple[Any, Any]:
    """Model and processor at the start of stage 1; see `embedded.start.start_pretraining`."""
    from xformer_mllm.embedded import start

    return start.start_pretraining(variant, seed, second_encoder, settings, encoders or start.WEIGHTS)


def captions(data: str, split: str, size: int) -> Dataset:
    """Images with captions of one of `DATA`; `size` is the number of those that are drawn."""
    if data == "easy-vqa":
        from xformer_mllm.embedded.easy_vqa import EasyVqaCaptions

        return EasyVqaCaptions(split)  # type: ignore[arg-type]
    from xformer_mllm.embedded.photographs import WORLDS
    from xformer_mllm.embedded.scenes import DETAILED, WRITTEN, SceneCaptions

    detail = DETAILED if data == "scenes-detailed" else WRITTEN
    return SceneCaptions(split, size, detail=detail, world=WORLDS[data])


def questions(data: str, split: str, size: int, questions_per_image: int) -> Dataset:
    """Questions of one of `DATA`, image by image; easy-VQA has its own number of questions per image."""
    from xformer_mllm.data.questions import ByImage

    if data == "easy-vqa":
        from xformer_mllm.embedded.easy_vqa import EasyVqaQuestions

        return ByImage.of(EasyVqaQuestions(split))  # type: ignore[arg-type]
    from xformer_mllm.embedded.photographs import WORLDS
    from xformer_mllm.embedded.scenes import SceneQuestions

    scenes = SceneQuestions(split, size, questions_per_scene=questions_per_image, world=WORLDS[data])
    firsts = range(0, len(scenes), questions_per_image)
    return ByImage(scenes, [list(range(first, first + questions_per_image)) for first in firsts])


def benchmarks() -> dict[str, Any]:
    """Name -> class of the benchmarks on `DATA`."""
    from xformer_mllm.embedded.benchmarks import BENCHMARKS

    return BENCHMARKS


def test_images(data: str, count: int) -> dict[str, Image.Image]:
    """The first `count` test images of one of `DATA`, by name."""
    if data == "easy-vqa":
        from xformer_mllm.embedded.easy_vqa import EasyVqaQuestions

        dataset = EasyVqaQuestions("test")
        ids = list(dict.fromkeys(question.image_id for question in dataset.questions))[:count]
        return {image_id: dataset.image(image_id) for image_id in ids}
    if data == "photographs":
        photographs = captions(data, "test", count)
        return {item["id"]: item["image"] for item in (photographs[number] for number in range(count))}
    return {name: scene(name) for name in (f"scene:test:{number}" for number in range(count))}


def scene(name: str) -> Image.Image:
    """The image of scene:SPLIT:INDEX. Raises ValueError for any other name."""
    from xformer_mllm.embedded.scenes import SceneCaptions

    split, _, index = name.removeprefix("scene:").partition(":")
    if not index.isdecimal():
        raise ValueError(f"{name}: a scene is named scene:SPLIT:INDEX, e.g. scene:test:3")
    return SceneCaptions(split, int(index) + 1)[int(index)]["image"]
