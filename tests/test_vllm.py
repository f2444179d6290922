"""The vLLM plugin: entry point; and with vLLM in the environment, its answers against our own (docs/vllm.md)."""

import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import torch
from published import bytes_of
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, PreTrainedTokenizerFast, T5Config

from xformer_mllm import XFormerConfig, XFormerForConditionalGeneration, XFormerProcessor, defaults, vllm
from xformer_mllm.embedded.scenes import SceneQuestions

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
needs_vllm = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM: see docs/vllm.md"),
]


def test_vllm_finds_the_plugin():
    (plugin,) = entry_points(group="vllm.general_plugins", name="xformer")
    assert plugin.load() is vllm.register


def rows(number: int) -> list[dict]:
    """Questions about held-out scenes, four about each: an image comes again with other questions."""
    data = SceneQuestions("validation", number // 4, questions_per_scene=4)
    return [data[index] for index in range(number)]


def ours(folder: Path, asked: list[dict], prompt: str, max_new_tokens: int) -> list[list[int]]:
    """Greedy answers, one by one."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    found = []
    for row in asked:
        inputs = processor(images=row["image"], text=prompt.format(row["question"]))
        answer = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        found.append(answer[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def theirs(folder: Path, asked: list[dict], prompt: str, max_new_tokens: int, **settings) -> list[list[int]]:
    """vLLM's, all together."""
    from vllm import LLM, SamplingParams

    fields = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True} | settings
    llm = LLM(model=str(folder), **fields)
    prompts = [
        {"prompt": prompt.format(row["question"]), "multi_modal_data": {"image": row["image"]}} for row in asked
    ]
    answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=max_new_tokens))
    llm.llm_engine.engine_core.shutdown()
    return [list(answer.outputs[0].token_ids) for answer in answers]


class TestAnswers:
    """Token by token, in fp32."""

    pytestmark = needs_vllm

    @pytest.mark.parametrize("name", ["xformer", "qformer"])
    def test_200_answers_about_scenes(self, name):
        folder, asked, prompt = defaults.shipped_model(name), rows(200), "Question: {} Answer:"
        expected = ours(folder, asked, prompt, 8)
        assert len(set(map(tuple, expected))) > 10
        assert theirs(folder, asked, prompt, 8) == expected

    @pytest.mark.parametrize("instruction_aware", [True, False])
    def test_another_language_model_with_a_chat_template(self, llama, instruction_aware):
        folder, asked = llama(instruction_aware), rows(40)
        expected = ours(folder, asked, "{}", 16)
        assert len(set(map(tuple, expected))) > 5
        assert theirs(folder, asked, "{}", 16, max_model_len=192) == expected

    def test_half_precision(self):
        """In bf16 most answers are the same."""
        asked, prompt = rows(40), "Question: {} Answer:"
        expected = ours(defaults.shipped_model(), asked, prompt, 8)
        found = theirs(defaults.shipped_model(), asked, prompt, 8, dtype="bfloat16")
        assert sum(a == b for a, b in zip(found, expected, strict=True)) > 32

    @pytest.mark.parametrize(
        ("change", "said"), [({"lora_rank": 2}, "LoRA"), ({"text_config": T5Config()}, "encoder-decoder")]
    )
    def test_what_vllm_cannot_run_is_refused(self, change, said):
        from xformer_mllm.vllm.model import check

        config = XFormerConfig.from_pretrained(defaults.shipped_model())
        ((name, value),) = change.items()
        setattr(config, name, value)
        with pytest.raises(ValueError, match=said):
            check(config)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A function: a folder of the shipped X-Former before a random Llama with a chat template."""

    def write(instruction_aware: bool) -> Path:
        folder = tmp_path_factory.mktemp("llama")
        shipped = defaults.shipped_model()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bytes_of("<s>", "</s>", "<pad>"), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )
        before = AutoProcessor.from_pretrained(shipped)
        processor = XFormerProcessor(
            before.image_processor,
            tokenizer,
            before.qformer_tokenizer,
            num_query_tokens=12,
            instruction_aware=instruction_aware,
            turn=["<s>User: ", " \nAssistant:", " "],
        )
        config = XFormerConfig.from_pretrained(shipped)
        config.text_config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            initializer_range=0.2,
        )
        config.instruction_aware, config.image_token_index = instruction_aware, processor.image_token_id
        model = XFormerForConditionalGeneration(config)
        trained = AutoModelForImageTextToText.from_pretrained(shipped)
        model.xformer.load_state_dict(trained.xformer.state_dict())
        torch.nn.init.normal_(model.language_projection.weight, std=0.3)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """vLLM's server on the shipped X-Former: `vllm serve`, whose command does not start where the package is vllm-cpu."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(defaults.shipped_model())]
    words += [
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--max-model-len",
        "128",
        "--enforce-eager",
        "--served-model-name",
        "xformer",
    ]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as file:
        server = subprocess.Popen(words, stdout=file, stderr=file)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert server.poll() is None, log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def messages(row: dict) -> list[dict]:
    file = io.BytesIO()
    row["image"].save(file, format="PNG")
    image = {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}
    parts = [{"type": "image_url", "image_url": image}, {"type": "text", "text": row["question"]}]
    return [{"role": "user", "content": [part for part in parts if part.get("text") != ""]}]


class TestServe:
    """The OpenAI client against `vllm serve`."""

    pytestmark = needs_vllm

    def client(self, url):
        import openai

        return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def ask(self, url, row, **settings):
        fields = {"model": "xformer", "temperature": 0, "max_tokens": 8} | settings
        return self.client(url).chat.completions.create(messages=messages(row), **fields)

    def test_answers_of_16_clients(self, url):
        asked = rows(40)
        processor = AutoProcessor.from_pretrained(defaults.shipped_model())
        expected = processor.batch_decode(
            ours(defaults.shipped_model(), asked, "Question: {} Answer:", 8), skip_special_tokens=True
        )
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda row: self.ask(url, row), asked))
        # vLLM gives the first word its space.
        assert [answer.choices[0].message.content.strip() for answer in found] == expected
        assert found[0].usage.prompt_tokens > 12

    def test_streaming(self, url):
        (row,) = rows(4)[:1]
        whole = self.ask(url, row).choices[0].message.content
        pieces = [piece.choices[0].delta.content or "" for piece in self.ask(url, row, stream=True) if piece.choices]
        assert "".join(pieces) == whole

    def test_an_image_alone_is_described(self, url):
        row = {**rows(4)[0], "question": ""}
        (expected,) = ours(defaults.shipped_model(), [row], "", 20)
        processor = AutoProcessor.from_pretrained(defaults.shipped_model())
        found = self.ask(url, row, max_tokens=20).choices[0].message.content
        assert found.strip() == processor.decode(expected, skip_special_tokens=True)

    def test_a_conversation_is_refused(self, url):
        import openai

        row = rows(4)[0]
        turns = [*messages(row), {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
        with pytest.raises(openai.BadRequestError, match="one question about one image"):
            self.client(url).chat.completions.create(model="xformer", messages=turns)
        two = json.loads(json.dumps(messages(row)))
        two[0]["content"].insert(0, two[0]["content"][0])
        with pytest.raises(openai.BadRequestError, match="image"):
            self.client(url).chat.completions.create(model="xformer", messages=two)
