"""examples/vlmevalkit.py on a stand-in for VLMEvalKit's base class."""

import runpy
import sys
import types
from pathlib import Path

import pytest

from xformer_mllm import defaults, inference
from xformer_mllm.commands import AskConfig

EXAMPLE = Path(__file__).parents[1] / "examples" / "vlmevalkit.py"


@pytest.fixture
def wrapper(monkeypatch):
    base = types.ModuleType("vlmeval.vlm.base")
    base.BaseModel = type("BaseModel", (), {})  # type: ignore[attr-defined]
    for name, module in {
        "vlmeval": types.ModuleType("vlmeval"),
        "vlmeval.vlm": types.ModuleType("vlmeval.vlm"),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "vlmeval.vlm.base", base)
    return runpy.run_path(str(EXAMPLE))["XFormer"]


def test_answers_are_those_of_xformer_ask(wrapper):
    image = str(defaults.example_images()[0])
    questions = ("What texture does the yellow triangle have?", "How many objects are there in the image?")
    model = wrapper(str(defaults.shipped_model()), max_new_tokens=8)
    for row in inference.ask(AskConfig(image=image, questions=questions)):
        message = [{"type": "image", "value": image}, {"type": "text", "value": row["question"]}]
        assert inference.readable(model.generate_inner(message, "MMBench")) == row["answer"]


def test_other_numbers_of_images_are_an_error(wrapper):
    model = wrapper(str(defaults.shipped_model()))
    image = {"type": "image", "value": str(defaults.example_images()[0])}
    for message in ([{"type": "text", "value": "a"}], [image, image]):
        with pytest.raises(ValueError, match="X-Former reads exactly one"):
            model.generate_inner(message, "MMBench")
