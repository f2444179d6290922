"""The lmms-eval adapter: on a stand-in for lmms-eval's base class where the package is missing, and (slow) inside it."""

import copy
import importlib
import importlib.util
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from xformer_mllm.checkpoints import start_generation
from xformer_mllm.cli import main
from xformer_mllm.commands import EvaluateConfig
from xformer_mllm.defaults import shipped_model
from xformer_mllm.evaluate.evaluation import evaluate

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
GQA = "\nAnswer the question using a single word or phrase."
GREEDY = {"max_new_tokens": 6, "temperature": 0.0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": ["\n\n"]}
COLOURS = ("red", "lime", "blue")
QUESTIONS = (
    "What?",
    "What colour is the circle?",
    "How many objects are there in the image?",
    "Is the small red circle in the top row to the left of the large striped green square?",
    "Where is the circle?",
    "Does a cross exist in the image?",
    "What shape is the green object?",
)


class BaseClass:
    """What lmms_eval.api.model.lmms gives to a model."""

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._world_size)


@pytest.fixture(scope="module")
def adapter():
    """The module, with the real base class if lmms-eval is installed."""
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
                patch.setitem(sys.modules, name, ModuleType(name))
            sys.modules["lmms_eval.api.model"].lmms = BaseClass
        yield importlib.import_module("xformer_mllm.lmms_eval")
        if not INSTALLED:
            del sys.modules["xformer_mllm.lmms_eval"]


@pytest.fixture(scope="module")
def models(adapter, runs, tmp_path_factory):
    """lm, and aware, whose Q-Former reads the prompt; with a task of three documents, each an image of one colour."""
    folder = tmp_path_factory.mktemp("aware")
    for part in start_generation(runs / "stage1" / "model", instruction_aware=True):
        part.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xformer_mllm.inference.bf16_is_fast", lambda: False)
        loaded = {"lm": adapter.XFormer(str(runs / "stage2"), batch_size="3", device="cpu")}
        loaded["aware"] = adapter.XFormer(str(folder), batch_size=3, device="cpu")
        for lm in loaded.values():
            lm.task_dict["task"] = {"test": [{"image": image(document)} for document in range(3)]}
        yield loaded


@pytest.fixture
def lm(models):
    return copy.copy(models["lm"])


def asks(context, second, document, doc_to_visual=lambda doc: [doc["image"]]):
    """A request, as lmms-eval's: second is generation_kwargs, or a continuation."""
    return SimpleNamespace(args=(context, second, doc_to_visual, document, "task", "test"))


def image(document):
    return Image.new("RGB", (48, 48), COLOURS[document])


# ------------------------------------------------------------------------------------------------- what a task asks for


@pytest.mark.parametrize(
    ("context", "question"),
    [
        ("Is it red?", "Is it red?"),
        ("Is it red?" + GQA, "Is it red?"),
        (
            "Why?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + GQA,
            "Why?",
        ),
        (
            "Which?\nA. one\nB. two\nAnswer with the option's letter from the given choices directly.",
            "Which?\nA. one\nB. two\nAnswer with the option's letter from the given choices directly.",
        ),
    ],
)
def test_question_without_the_orders_for_chat_models(adapter, context, question):
    assert adapter.question_in(context) == question


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_new_tokens": 32, "do_sample": False}),
        (GREEDY, {"max_new_tokens": 6, "num_beams": 1, "do_sample": False}),
        ({"temperature": 0, "do_sample": True}, {"max_new_tokens": 32, "do_sample": False}),
        (
            {"temperature": 0.5, "top_p": 0.9},
            {"max_new_tokens": 32, "temperature": 0.5, "top_p": 0.9, "do_sample": True},
        ),
        ({"temperature": 0.5, "do_sample": False}, {"max_new_tokens": 32, "do_sample": False}),
        ({"do_sample": True, "top_k": 5}, {"max_new_tokens": 32, "top_k": 5, "do_sample": True}),
        (
            {"num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 10},
            {"max_new_tokens": 10, "num_beams": 5, "length_penalty": -1.0, "do_sample": False},
        ),
        ({"length_penalty": -1.0, "max_new_tokens": None}, {"max_new_tokens": 32, "do_sample": False}),
        (
            {"min_new_tokens": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
            {"max_new_tokens": 32, "min_new_tokens": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 3}
            | {"do_sample": False},
        ),
    ],
)
def test_generate_arguments(adapter, given, expected, caplog):
    assert adapter.generate_arguments(given) == expected
    assert not caplog.messages


def test_generation_kwargs_that_are_not_for_us_are_named(adapter, caplog):
    given = {"image_aspect_ratio": "original", "max_new_tokens": 4}
    assert adapter.generate_arguments(given) == {"max_new_tokens": 4, "do_sample": False}
    assert "image_aspect_ratio" in caplog.text


@pytest.mark.parametrize(
    ("until", "answer", "expected"),
    [
        (None, " red \n", "red"),
        ("\n", " red\nblue", "red"),
        (["ASSISTANT:", "\n\n"], "red\n\nblue ASSISTANT: green", "red"),
        (["", "x"], "red", "red"),
        ([], "red", "red"),
        ("red", "red", ""),
    ],
)
def test_until_ends_an_answer(adapter, until, answer, expected):
    assert adapter.cut(answer, adapter.stops({"until": until})) == expected


def test_until_must_be_text(adapter):
    with pytest.raises(ValueError, match="until must be a text or a list of texts, not 3"):
        adapter.stops({"until": 3})


def test_batches_are_of_one_group_and_the_longest_first(adapter):
    lengths, groups = [3, 9, 5, 1, 7, 8], ["a", "a", "b", "a", "b", "a"]
    assert list(adapter.batches(lengths, groups, 2)) == [[1, 5], [0, 3], [4, 2]]
    assert list(adapter.batches([], [], 2)) == []


# --------------------------------------------------------------------------------------------------------- the answers


def answer_alone(lm, text, document, **arguments):
    inputs = lm.processor(images=image(document), text=text)
    tokens = lm.model.generate(**inputs, do_sample=False, **arguments)[:, inputs["input_ids"].shape[1] :]
    return lm.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize("model", ["lm", "aware"])
def test_answers_are_those_of_each_request_alone(models, model):
    lm = models[model]
    asked = [(question, 2 if n % 3 == 0 else 8, n % 3) for n, question in enumerate(QUESTIONS)]
    expected = [
        answer_alone(lm, f"Question: {question} Answer:", document, max_new_tokens=longest)
        for question, longest, document in asked
    ]
    assert len(set(expected)) > 3  # else a wrong order could not be seen
    requests = [asks(q + GQA, {**GREEDY, "max_new_tokens": longest}, document) for q, longest, document in asked]
    kwargs = [dict(r.args[1]) for r in requests]
    assert lm.generate_until(requests) == expected
    assert [r.args[1] for r in requests] == kwargs  # lmms-eval's response cache reads them afterwards


def test_every_prompt_follows_its_image_which_is_read_once(lm, monkeypatch):
    seen = []

    def generate(pixel_values, input_ids, attention_mask, image_index, **_):
        for ids, place in zip(input_ids, image_index, strict=True):
            text = lm.processor.tokenizer.decode(ids, skip_special_tokens=True)
            seen.append((text.strip(), pixel_values[place, :, 0, 0].tolist()))
        seen.append(len(pixel_values))
        return torch.cat([input_ids, input_ids[:, -1:]], dim=1)

    monkeypatch.setattr(lm.model, "generate", generate)
    loads = []

    def doc_to_visual(doc):
        loads.append(doc)
        return [doc["image"]]

    lm.prompt = "{context}"
    lm.generate_until([asks(f"object {n}", GREEDY, n // 2, doc_to_visual) for n in range(6)])
    pixels = [list(image(document).getpixel((0, 0))) for document in range(3)]
    texts = [row for row in seen if not isinstance(row, int)]
    assert sorted(texts) == [(f"object {n}", pixels[n // 2]) for n in range(6)]
    assert [row for row in seen if isinstance(row, int)] == [2, 2]
    assert len(loads) == 4


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("Question: {question} Answer:", "Question: Is it red? Answer:"),
        ("Q: {question} Short answer:", "Q: Is it red? Short answer:"),
        ("{context}", "Is it red?" + GQA),
        ("a photo of", "a photo of"),
        ("", ""),
    ],
)
def test_prompt_is_the_one_asked_for_and_is_shown(adapter, lm, monkeypatch, capsys, prompt, shown):
    assert lm.prompt == "Question: {question} Answer:"
    texts = []
    processor = lm.processor

    def spy(images=None, text=None):
        texts.extend(text or [])
        return processor(images=images, text=text)

    spy.tokenizer = processor.tokenizer
    monkeypatch.setattr(lm, "processor", spy)
    lm.prompt = prompt
    lm.generate_until([asks("<image>Is it red?" + GQA, GREEDY, 0)])
    assert texts == [shown]
    assert repr(shown) in capsys.readouterr().err


def test_until_of_the_task_is_kept_to(lm):
    (whole,) = lm.generate_until([asks(QUESTIONS[2], GREEDY, 0)])
    middle = whole[len(whole) // 2]
    (ended,) = lm.generate_until([asks(QUESTIONS[2], {**GREEDY, "until": [middle]}, 0)])
    assert middle in whole
    assert ended == whole[: whole.index(middle)].strip()


def test_answer_ends_where_the_language_models_positions_do(lm, monkeypatch):
    positions, lengths = lm.model.config.text_config.max_position_embeddings, []

    def generate(input_ids, max_new_tokens, **_):
        lengths.append(input_ids.shape[1] + max_new_tokens)
        return torch.cat([input_ids, input_ids[:, -1:]], dim=1)

    monkeypatch.setattr(lm.model, "generate", generate)
    lm.generate_until([asks("What?", {"max_new_tokens": 10 * positions}, 0)])
    assert lengths == [positions + 1]  # the last token is not read
    with pytest.raises(ValueError, match=f"the language model reads at most {positions}"):
        lm.generate_until([asks("what " * positions, GREEDY, 0)])


@pytest.mark.parametrize("visuals", [None, [], [Image.new("RGB", (8, 8))] * 2])
def test_a_request_has_one_image(lm, visuals):
    for call, second in ((lm.generate_until, GREEDY), (lm.loglikelihood, " red")):
        with pytest.raises(ValueError, match=f"task, document 1: {len(visuals or [])} images; .* exactly one"):
            call([asks("What?", second, 1, lambda doc: visuals)])


def test_no_requests(lm):
    assert lm.generate_until([]) == []
    assert lm.loglikelihood([]) == []


# ----------------------------------------------------------------------------------------------------------- likelihood


def step_by_step(lm, text, continuation, document):
    """Mean negative log-probability and is_greedy, one token at a time behind what the processor makes of the prompt."""
    inputs = lm.processor(images=image(document), text=text)
    losses, greedy = [], []
    for token in lm.processor.tokenizer(continuation, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            following = lm.model(**inputs).logits[0, -1].log_softmax(-1)
        losses.append(-following[token].item())
        greedy.append(following.argmax().item() == token)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return sum(losses) / len(losses), all(greedy)


@pytest.mark.parametrize("model", ["lm", "aware"])
def test_loglikelihood_is_the_mean_loss_of_the_continuation(models, model):
    lm = models[model]
    asked = [
        (question, continuation, n % 3)
        for n, question in enumerate(QUESTIONS[:4])
        for continuation in (" red", " a small red circle", " yes")
    ]
    found = lm.loglikelihood([asks(*row) for row in asked])
    for (question, continuation, document), (loss, greedy) in zip(asked, found, strict=True):
        expected = step_by_step(lm, f"Question: {question} Answer:", continuation, document)
        assert loss == pytest.approx(expected[0], rel=1e-4)
        assert greedy is expected[1]
    assert len({round(loss, 5) for loss, _ in found}) == len(asked)


def test_what_greedy_decoding_says_is_greedy(lm):
    tokenizer, text = lm.processor.tokenizer, "Question: What? Answer:"
    inputs = lm.processor(images=image(0), text=text)
    said = lm.model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    continuation = tokenizer.decode(said)
    assert tokenizer(continuation, add_special_tokens=False)["input_ids"] == said.tolist()
    requests = [asks("What?", continuation, 0), asks("What?", continuation + " red", 0)]
    assert [greedy for _, greedy in lm.loglikelihood(requests)] == [True, False]


def test_continuation_may_come_from_the_document(lm):
    lm.task_dict["task"]["test"][1]["answer"] = " red"
    given, made = lm.loglikelihood([asks("What?", " red", 1), asks("What?", lambda doc: doc["answer"], 1)])
    assert given[0] == pytest.approx(made[0], rel=1e-5)


def test_empty_continuation(lm):
    with pytest.raises(ValueError, match="task, document 2: an empty continuation"):
        lm.loglikelihood([asks("What?", "", 2)])


# --------------------------------------------------------------------------------------------------------------- set-up


def test_no_conversations(lm):
    with pytest.raises(NotImplementedError, match="holds no conversation"):
        lm.generate_until_multi_round([])


@pytest.mark.parametrize("batch_size", ["auto", "0", 0, "auto:4", "1.5"])
def test_batch_size_is_a_number(adapter, batch_size):
    with pytest.raises(ValueError, match="batch_size must be a number of requests, at least 1"):
        adapter.XFormer("nowhere", batch_size=batch_size)


def test_wrong_folder_is_named(adapter, runs, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        adapter.XFormer(str(tmp_path))
    with pytest.raises(ValueError, match=r"stage1.*holds a stage-1 model; this needs a stage-2 one"):
        adapter.XFormer(str(runs / "stage1"))


def test_entry_point_is_the_manifest(adapter):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    entry = project["entry-points"]["lmms_eval.models"]["xformer"]
    assert pkgutil.resolve_name(entry) is adapter.manifest


# ---------------------------------------------------------------------------------------------- inside the real package

real = pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed: see docs/lmms-eval.md")


def write_task(folder, name, output_type, rows, more=""):
    """A task of lmms-eval's own format over a local JSON file, with GQA's post-prompt."""
    (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "documents.py").write_text(
        textwrap.dedent(
            """
            from PIL import Image

            def doc_to_visual(doc):
                return [Image.open(doc["image"])]

            def doc_to_text(doc, lmms_eval_specific_kwargs):
                return doc["question"] + lmms_eval_specific_kwargs["post_prompt"]
            """
        )
    )
    (folder / f"{name}.yaml").write_text(
        textwrap.dedent(
            f"""
            task: {name}
            dataset_path: json
            dataset_kwargs:
              data_files: {{test: {folder / name}.json}}
              cache_dir: {folder / "cache"}
            test_split: test
            output_type: {output_type}
            doc_to_visual: !function documents.doc_to_visual
            doc_to_text: !function documents.doc_to_text
            doc_to_target: answer
            lmms_eval_specific_kwargs:
              default: {{post_prompt: {json.dumps(GQA)}}}
            """
        )
        + textwrap.dedent(more)
    )


def documents(folder):
    """A document for each question, about an image in a file."""
    for colour in COLOURS:
        Image.new("RGB", (48, 48), colour).save(folder / f"{colour}.png")
    return [
        {"question": question, "image": str(folder / f"{COLOURS[n % 3]}.png"), "document": n % 3}
        for n, question in enumerate(QUESTIONS)
    ]


GENERATION = """
    generation_kwargs: {max_new_tokens: 8, temperature: 0, do_sample: false}
    metric_list:
      - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.mark.slow
@real
def test_lmms_eval_knows_the_model(adapter):
    from lmms_eval.models import registry_v2

    registry = registry_v2.ModelRegistryV2()
    registry.register_manifest(adapter.manifest())
    assert registry.get_model_class("xformer") is adapter.XFormer
    assert registry.resolve("xformer").model_type == "simple"


@pytest.mark.slow
@real
def test_default_orders_are_those_of_the_installed_tasks(adapter):
    import lmms_eval.tasks
    import yaml

    tasks = Path(lmms_eval.tasks.__file__).parent
    for file in ("gqa/gqa.yaml", "vqav2/_default_template_vqav2_yaml", "ok_vqa/_default_template_vqa_yaml"):
        text = (tasks / file).read_text()
        options = yaml.safe_load(text[text.index("lmms_eval_specific_kwargs:") :])["lmms_eval_specific_kwargs"]
        assert adapter.question_in(f"Is it red?{options['default']['post_prompt']}") == "Is it red?"


IN_32_BITS = """
from lmms_eval.cli.dispatch import main
from xformer_mllm import inference
inference.bf16_is_fast = lambda: False
main()
"""
"""lmms-eval's own command, in 32 bits, where no answer depends on its batch."""


@pytest.mark.slow
@real
@pytest.mark.parametrize("processes", [1, 2])
def test_answers_reach_the_score_of_the_real_evaluator(lm, runs, tmp_path, processes):
    rows = documents(tmp_path)
    for row in rows:
        prompt = f"Question: {row['question']} Answer:"
        row["answer"] = answer_alone(lm, prompt, row.pop("document"), max_new_tokens=8)
    rows[3]["answer"] = "something else"
    write_task(tmp_path, "ours", "generate_until", rows, GENERATION)
    command = tmp_path / "command.py"
    command.write_text(IN_32_BITS)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2"] if processes == 2 else []
    ask = ["--model", "xformer", "--model_args", f"pretrained={runs / 'stage2'}", "--batch_size", "3"]
    task = [
        "--tasks",
        "ours",
        "--include_path",
        str(tmp_path),
        "--output_path",
        str(tmp_path / "out"),
        "--log_samples",
    ]
    subprocess.run(
        [sys.executable, *launch, str(command), *ask, *task],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "ACCELERATE_USE_CPU": "1"},
    )
    (results,) = (tmp_path / "out").rglob("*results.json")
    assert json.loads(results.read_text())["results"]["ours"]["exact_match,none"] == pytest.approx(6 / 7)


TASKS = Path(__file__).parents[1] / "examples" / "lmms_eval"
CAPTION_SCORES = {"coco_CIDEr": "CIDEr-D", "coco_METEOR": "METEOR", "coco_ROUGE_L": "ROUGE-L"}
CAPTION_SCORES |= {f"coco_Bleu_{number}": f"BLEU-{number}" for number in (1, 2, 3, 4)}


@pytest.mark.slow
@real
@pytest.mark.parametrize(
    ("benchmark", "prompt", "metrics"),
    [
        ("gqa", None, {"exact_match": "accuracy"}),
        ("vqav2", None, {"exact_match": "accuracy"}),
        ("coco-captions", "a photo of", CAPTION_SCORES),
    ],
)
def test_local_tasks_have_the_scores_of_xformer_evaluate(adapter, tmp_path, monkeypatch, benchmark, prompt, metrics):
    """Exported scenes in the official files; scored by lmms-eval's own functions, and by ours."""
    if benchmark == "coco-captions" and not shutil.which("java"):
        pytest.skip("lmms-eval's caption scores need Java")
    data, model = tmp_path / "data", shipped_model()
    main(["data", "export", benchmark, "--output-dir", str(data), "--size", "60"])
    monkeypatch.setattr("xformer_mllm.inference.bf16_is_fast", lambda: False)
    ours = evaluate(EvaluateConfig(model=model, benchmark=benchmark, data=data, output_dir=tmp_path / "ours"))

    def call(*words):
        environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "ACCELERATE_USE_CPU": "1"}
        subprocess.run([sys.executable, *words], check=True, capture_output=True, cwd=tmp_path, env=environment)

    call(str(TASKS / "documents.py"), benchmark, str(data))
    command = tmp_path / "command.py"
    command.write_text(IN_32_BITS)
    arguments = f"pretrained={model}" + (f",prompt={prompt}" if prompt else "")
    task = f"local_{benchmark.replace('-', '_')}"
    words = ["--model", "xformer", "--model_args", arguments, "--batch_size", "16", "--tasks", task]
    call(str(command), *words, "--include_path", str(TASKS), "--output_path", str(tmp_path / "out"))
    (results,) = (tmp_path / "out" / "models__xformer").glob("*results.json")
    theirs = json.loads(results.read_text())["results"][task]
    for name, own in metrics.items():
        assert theirs[f"{name},none"] == pytest.approx(ours["scores"]["all"][own], abs=1e-9)
        assert ours["scores"]["all"][own] > 0.05


@pytest.mark.slow
@real
def test_multiple_choice_is_scored_by_the_smallest_loss(lm, tmp_path):
    from lmms_eval.api.instance import Instance
    from lmms_eval.tasks import TaskManager, get_task_dict

    options = [" red", " a cross", " yes", " two"]
    rows = documents(tmp_path)
    for row in rows:
        losses = [step_by_step(lm, f"Question: {row['question']} Answer:", o, row["document"])[0] for o in options]
        row |= {"options": [o.strip() for o in options], "answer": options[losses.index(min(losses))].strip()}
    more = "doc_to_choice: options\nmetric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    write_task(tmp_path, "choice", "multiple_choice", rows, more)
    task = get_task_dict(["choice"], TaskManager(include_path=str(tmp_path), include_defaults=False), "simple")[
        "choice"
    ]
    lm.task_dict = {"choice": task.dataset}
    task.build_all_requests(rank=0, world_size=1)
    assert all(isinstance(instance, Instance) for instance in task.instances)
    found = lm.loglikelihood(task.instances)
    for doc_id, doc in enumerate(task.test_docs()):
        results = [score for score, inst in zip(found, task.instances, strict=True) if inst.doc_id == doc_id]
        assert task.process_results(doc, results)["acc"] == 1.0
