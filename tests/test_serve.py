"""`xformer serve`: the API with the real OpenAI client over HTTP, its limits, and the engine's batches."""

import base64
import contextlib
import http.client
import io
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
import uvicorn
from PIL import Image

from xformer_mllm import defaults, inference
from xformer_mllm.cli import main
from xformer_mllm.commands import AskConfig, ServeConfig
from xformer_mllm.embedded.scenes import SceneQuestions
from xformer_mllm.serve import engine as engine_module
from xformer_mllm.serve import server as server_module
from xformer_mllm.serve.api import create_app
from xformer_mllm.serve.engine import Engine, FullError, Question, Sampling

QUESTION = "What texture does the yellow triangle have?"


@pytest.fixture(scope="module", autouse=True)
def fp32():
    """In bf16 another batch rounds differently."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "bf16_is_fast", lambda: False)
        yield


class Server:
    """An application on a port of its own, in a thread."""

    def __init__(self, config: ServeConfig, models):
        self.listening = server_module.listen("127.0.0.1", 0)
        self.port = self.listening.getsockname()[1]
        self.engine = Engine(models, max_batch=config.max_batch, max_waiting=config.max_waiting)
        app = create_app(self.engine, server_module.settings_of(config, models))
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.listening]}, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.port}"
        while not self.uvicorn.started:
            time.sleep(0.01)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def models(fp32):
    return server_module.load(ServeConfig(page=False))


@pytest.fixture(scope="module")
def server(models):
    started = Server(ServeConfig(page=False), models)
    yield started
    started.stop()


@pytest.fixture
def client(server):
    return server.client()


def data_url(image: Image.Image, form: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, format=form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def example(number: int = 0) -> Image.Image:
    return Image.open(defaults.example_images()[number])


def about(image: Image.Image | str, text: str | None = QUESTION) -> list[dict]:
    url = image if isinstance(image, str) else data_url(image)
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": parts + ([] if text is None else [{"type": "text", "text": text}])}]


def ask(client, messages=None, **settings):
    return client.chat.completions.create(
        **{"model": "xformer", "messages": messages or about(example()), "max_tokens": 8} | settings
    )


@pytest.fixture
def blocked(server):
    """The engine's thread is busy until the test ends, or sets the event."""
    event = threading.Event()
    server.engine.run(event.wait)
    yield event
    event.set()


# ---------------------------------------------------------------------------------------------------------------- chat


def test_answers_are_those_of_xformer_ask(client, capsys):
    questions = (QUESTION, "How many objects are there in the image?", "Is there a striped object?")
    path = str(defaults.example_images()[0])
    asked = inference.ask(AskConfig(image=path, questions=questions))
    for row in asked:
        answer = ask(client, about(example(), row["question"]))
        (choice,) = answer.choices
        assert choice.message.content == row["answer"]
        assert choice.finish_reason == "stop"
        assert choice.message.role == "assistant"
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("model", ["xformer", "qformer"])
def test_200_requests_of_16_clients_have_the_answers_of_one_by_one(server, models, model):
    data = SceneQuestions("validation", 50, questions_per_scene=4)
    rows = [data[index] for index in range(200)]
    loaded = models[model]
    alone = []
    for row in rows:
        prompt = inference.GREEDY_ANSWER.prompt_for(row["question"])
        pixels = loaded.pixels(row["image"])[None]
        options = inference.GREEDY_ANSWER.options() | {"min_new_tokens": 1}
        alone.append(inference.generate(loaded.model, loaded.processor, [prompt], pixels, **options)[0].text.strip())
    before = server.engine.metrics.registry.get_sample_value("xformer_batch_rows_count")
    client = server.client()
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda row: ask(client, about(row["image"], row["question"]), model=model), rows)
        assert [answer.choices[0].message.content for answer in found] == alone
    assert len(set(alone)) > 10
    batches = server.engine.metrics.registry.get_sample_value("xformer_batch_rows_count") - before
    assert batches < 150  # requests that waited together were batched


def test_answers_do_not_wait_for_acknowledgements(server):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.recv(1)
        (accepted,) = [
            one.transport.get_extra_info("socket")
            for one in server.uvicorn.server_state.connections
            if one.transport.get_extra_info("peername") == connection.getsockname()
        ]
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_stream(client):
    whole = ask(client, n=2)
    pieces = list(ask(client, n=2, stream=True, stream_options={"include_usage": True}))
    texts = {0: "", 1: ""}
    reasons = {}
    for piece in pieces[:-1]:
        for choice in piece.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert [texts[0], texts[1]] == [choice.message.content for choice in whole.choices]
    assert reasons == {0: "stop", 1: "stop"}
    assert pieces[-1].usage == whole.usage
    assert not pieces[-1].choices
    assert all(piece.usage is None for piece in pieces[:-1])
    assert pieces[0].choices[0].delta.role == "assistant"


@pytest.fixture
def endless(models, monkeypatch):
    """The model never ends by itself."""
    monkeypatch.setattr(models["xformer"].model.generation_config, "eos_token_id", None)


def test_a_text_ends_at_a_stop_text_or_the_maximum(client, endless):
    long = {"messages": about(example(), None), "temperature": 2.0, "seed": 0, "max_tokens": 12}
    text = ask(client, **long).choices[0]
    assert text.finish_reason == "length"
    words = text.message.content.split(" ")
    assert words[2] not in words[:2]
    stopped = ask(client, **long, stop=[words[2], "never said"])
    assert stopped.choices[0].message.content == text.message.content[: text.message.content.index(words[2])]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 12
    streamed = ask(client, **long, stop=words[2], stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in streamed) == stopped.choices[0].message.content


def test_sampling_with_a_seed_repeats_itself(client):
    def draw(seed):
        return [c.message.content for c in ask(client, temperature=1.5, seed=seed, n=8, max_tokens=4).choices]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert len(set(draw(1))) > 1


def test_top_p_of_almost_nothing_is_greedy(client):
    greedy = ask(client).choices[0].message.content
    assert {c.message.content for c in ask(client, temperature=2.0, top_p=1e-6, n=4).choices} == {greedy}


def test_a_conversation_is_about_its_last_image_and_encodes_it_once(client, server):
    def encoded():
        return server.engine.metrics.registry.get_sample_value("xformer_images_encoded_total")

    image = Image.effect_noise((48, 48), 60).convert("RGB")
    before = encoded()
    first = ask(client, about(image, "How many objects are there in the image?")).choices[0].message
    history = [{"role": "system", "content": "Be brief."}, *about(image, "How many?")]
    turns = [*history, {"role": "assistant", "content": first.content}, {"role": "user", "content": QUESTION}]
    assert ask(client, turns).choices[0].message.content == ask(client, about(image)).choices[0].message.content
    assert encoded() == before + 1
    ask(client, [*turns, {"role": "assistant", "content": "?"}, *about(example(1), "How many?")])
    assert encoded() >= before + 1


def test_encoded_images_are_forgotten_when_they_take_too_much_memory(models):
    engine = Engine(models, cache_bytes=1)
    pixels = models["xformer"].pixels(example())
    answers = []
    for _ in range(2):
        question = Question(model="xformer", prompt=f"Question: {QUESTION} Answer:", pixels=pixels, max_tokens=4)
        answers.append(engine.ask(question).result(60).choices[0].text)
    assert answers[0] == answers[1]
    assert engine.metrics.registry.get_sample_value("xformer_images_encoded_total") == 2
    engine.close()


def test_an_image_without_a_text_is_described(client, models):
    loaded = models["xformer"]
    (expected,) = inference.generate(
        loaded.model, loaded.processor, [""], loaded.pixels(example())[None], max_new_tokens=8, min_new_tokens=1
    )
    assert ask(client, about(example(), None)).choices[0].message.content == expected.text.strip()


def test_prompts_of_any_length_share_a_batch(models, blocked, server):
    """The longest prompt leaves few positions; the others are not cut short by it."""
    loaded = models["xformer"]
    positions = loaded.model.config.text_config.max_position_embeddings
    pixels = loaded.pixels(example())
    filler = " and".join([" the object"] * positions)
    ids = loaded.processor.tokenizer(filler)["input_ids"]
    longest = loaded.processor.tokenizer.decode(ids[: positions - loaded.processor.num_query_tokens - 4])
    prompts = [longest, f"Question: {QUESTION} Answer:", "a"]
    hot = Sampling(temperature=1e-3)  # greedy, but not ended by a small maximum
    questions = [Question(model="xformer", prompt=p, pixels=pixels, max_tokens=40, sampling=hot) for p in prompts]
    futures = [server.engine.ask(question) for question in questions]
    blocked.set()
    together = [future.result(60) for future in futures]
    alone = [
        server.engine.ask(Question(model="xformer", prompt=p, pixels=pixels, max_tokens=40, sampling=hot)).result(60)
        for p in prompts
    ]
    assert together == alone
    assert together[0].choices[0].tokens <= 8


# -------------------------------------------------------------------------------------------------------------- models


def test_models(client):
    assert [model.id for model in client.models.list()] == ["xformer", "qformer", "xformer-stage1"]
    assert client.models.retrieve("qformer").id == "qformer"
    with pytest.raises(openai.NotFoundError, match="'none' is not served here; models: xformer, qformer"):
        client.models.retrieve("none")


def test_a_run_is_served_by_its_name(runs, capsys):
    config = ServeConfig(model=runs / "stage2", stage1=runs / "stage1", page=False)
    models = server_module.load(config)
    settings = server_module.settings_of(config, models)
    assert settings.answering == ("stage2",)
    assert settings.embedding == "stage1"
    assert main(["serve", str(runs / "stage1")]) == 2
    assert "stage-1 model; this needs a stage-2 one" in capsys.readouterr().err
    assert main(["serve", str(runs / "stage2"), "--baseline", str(runs / "stage2")]) == 2
    assert "a model named 'stage2' is served already" in capsys.readouterr().err


def test_a_taken_port_is_one_line(server, capsys):
    assert main(["serve", "--port", str(server.port)]) == 2
    assert "cannot listen there" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- embeddings


def test_embeddings_are_those_that_itc_compares(client, models):
    model, processor = models["xformer-stage1"].model, models["xformer-stage1"].processor
    texts = ["a red circle", "two green squares"]
    with torch.inference_mode():
        text = processor(qformer_text=texts)
        of_texts = model.text_features(text["qformer_input_ids"], text["qformer_attention_mask"])
        pixels = torch.stack([models["xformer-stage1"].pixels(example(number)) for number in range(2)])
        of_images = model.image_features(model.xformer(pixels).fused_queries)
    images = [data_url(example(number)) for number in range(2)]
    inputs = [texts[0], images[0], texts[1], images[1]]
    found = client.embeddings.create(model="xformer-stage1", input=inputs)  # the client asks for base64
    assert [one.index for one in found.data] == [0, 1, 2, 3]
    np.testing.assert_allclose([found.data[0].embedding, found.data[2].embedding], of_texts, atol=1e-5)
    mean = torch.nn.functional.normalize(of_images.mean(1), dim=-1)
    np.testing.assert_allclose([found.data[1].embedding, found.data[3].embedding], mean, atol=1e-5)
    named = [{"text": texts[0]}, {"image": images[0]}]
    queries = client.embeddings.create(
        model="xformer-stage1", input=named, encoding_format="float", extra_body={"pooling": "none"}
    )
    every = np.reshape(queries.data[1].embedding, (model.config.num_query_tokens, -1))
    np.testing.assert_allclose(every, of_images[0], atol=1e-5)
    assert found.usage.prompt_tokens == int(text["qformer_attention_mask"].sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": [" "]}, "input 0 is an empty text"),
        ({"input": ["data:image/png;base64,AAAA"]}, "not a readable image"),
        ({"input": [{"text": "a", "image": "b"}]}, "an input is a text"),
        ({"input": "a", "dimensions": 3}, "dimensions"),
        ({"input": ["a"] * 65}, "at most 64 items"),
    ],
)
def test_wrong_inputs_of_embeddings(client, settings, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.embeddings.create(model="xformer-stage1", **settings)


def test_embeddings_need_stage_1(runs):
    started = Server(config := ServeConfig(model=runs / "stage2", page=False), server_module.load(config))
    with pytest.raises(openai.NotFoundError, match="--stage1"):
        started.client().embeddings.create(model="stage2", input="a")
    started.stop()


# -------------------------------------------------------------------------------------------------------------- errors


def too_long(text: str = "word ") -> str:
    return text * 2000


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "'gpt' is not served here"),
        ({"model": "xformer-stage1"}, openai.NotFoundError, "models: xformer, qformer"),
        ({"messages": [{"role": "user", "content": "hi"}]}, openai.BadRequestError, "no message has an image"),
        ({"messages": about("data:image/png;base64,???")}, openai.BadRequestError, "not valid base64"),
        ({"messages": about("data:image/png;base64,AAAA")}, openai.BadRequestError, "not a readable image"),
        ({"messages": about("/etc/passwd")}, openai.BadRequestError, "must be a data URL"),
        ({"messages": about("file:///etc/passwd")}, openai.BadRequestError, "must be a data URL"),
        ({"messages": about("http://127.0.0.1/a.png")}, openai.BadRequestError, "not fetched from this host"),
        ({"messages": about(example(), too_long())}, openai.BadRequestError, "reads at most 256"),
        (
            {"messages": [*about(example()), {"role": "assistant", "content": "a"}]},
            openai.BadRequestError,
            "last message",
        ),
        ({"max_tokens": 10_000}, openai.BadRequestError, "at most 256 tokens"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"n": 9}, openai.BadRequestError, "n: "),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"logprobs": True}, openai.BadRequestError, "logprobs is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools is not"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format is not supported"),
        ({"stop": ["a"] * 5}, openai.BadRequestError, "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_client_can_correct_is_an_error_in_openai_s_form(client, settings, kind, message, stream):
    with pytest.raises(kind, match=message) as found:
        ask(client, stream=stream, **settings)
    assert set(found.value.body) == {"message", "type", "param", "code"}


def test_two_images_in_one_message(client):
    (message,) = about(example())
    message["content"].insert(0, message["content"][0])
    with pytest.raises(openai.BadRequestError, match="2 images"):
        ask(client, [message])


def test_harmless_settings_are_accepted(client):
    assert ask(client, presence_penalty=0, logprobs=False, user="me", response_format={"type": "text"}).choices


@pytest.mark.parametrize("path", ["/v1/none", "/v1/chat/completions"])
def test_routes_that_do_not_exist(server, path):
    answer = httpx.get(server.url + path)
    assert answer.status_code in (404, 405)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_failure_is_reported_and_the_next_request_is_answered(client, server, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "generate", fail)
        with pytest.raises(openai.InternalServerError, match="its log has the reason"):
            ask(client)
    assert ask(client).choices
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


# -------------------------------------------------------------------------------------------------------------- limits


def test_a_full_queue_is_429_with_retry_after(models):
    started = Server(ServeConfig(page=False, max_waiting=2), models)
    event = threading.Event()
    started.engine.run(event.wait)
    client, answers = started.client(), queue.Queue()
    time.sleep(0.2)  # the first is not waiting any more
    threads = [threading.Thread(target=lambda: answers.put(ask(client))) for _ in range(2)]
    for thread in threads:
        thread.start()
    while started.engine.metrics.registry.get_sample_value("xformer_waiting") < 2:
        time.sleep(0.01)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as found:
            ask(client, stream=stream)
        assert found.value.response.headers["retry-after"] == "1"
    event.set()
    assert [answers.get(timeout=60).choices[0].finish_reason for _ in threads] == ["stop", "stop"]
    started.stop()


def test_a_request_that_waits_too_long_is_503(models):
    started = Server(ServeConfig(page=False, seconds=0.5), models)
    event = threading.Event()
    started.engine.run(event.wait)
    threading.Timer(1.0, event.set).start()
    with pytest.raises(openai.InternalServerError, match="took too long"):
        ask(started.client())
    started.stop()


def test_a_client_that_leaves_abandons_its_question(server, client, blocked, monkeypatch):
    asked = []
    queued = server.engine.ask
    monkeypatch.setattr(server.engine, "ask", lambda question: asked.append(question) or queued(question))
    body = json.dumps({"model": "xformer", "messages": about(example()), "stream": True})
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body.replace("true", str(stream).lower()), headers)
        while len(asked) < 1 + (not stream):
            time.sleep(0.01)
        connection.sock.close()
    limit = time.monotonic() + 20
    while not all(question.abandoned for question in asked) and time.monotonic() < limit:
        time.sleep(0.01)
    assert all(question.abandoned for question in asked)
    blocked.set()
    assert ask(client).choices
    assert all(question.result.cancelled() for question in asked[:2])


def test_an_abandoned_answer_ends(models, endless):
    engine = Engine(models)
    question = Question(model="xformer", prompt="a", pixels=models["xformer"].pixels(example()), max_tokens=60)
    question.on_text = lambda number, text: setattr(question, "abandoned", True)
    assert engine.ask(question).result(60).choices[0].tokens < 10
    engine.close()
    with pytest.raises(FullError):
        engine.ask(question)


def test_a_large_body_is_refused_before_it_is_read(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(10**9))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413
    assert "larger than 20,000,000 bytes" in json.loads(answer.read())["error"]["message"]


def test_a_large_body_of_unknown_length_is_refused(server):
    def endless():
        for _ in range(400):
            yield b" " * 100_000

    answer = httpx.post(
        f"{server.url}/v1/chat/completions", content=endless(), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413


def test_a_body_that_does_not_arrive_is_408(models):
    started = Server(ServeConfig(page=False, seconds=0.3), models)
    with socket.create_connection(("127.0.0.1", started.port)) as connection:
        head = ("POST /v1/chat/completions HTTP/1.1", "Host: a", "Content-Type: application/json", "Content-Length: 9")
        connection.sendall("\r\n".join([*head, "", "{"]).encode())
        connection.settimeout(20)
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
    started.stop()


def test_a_key(models):
    started = Server(ServeConfig(page=False, api_key="sécret"), models)
    with pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
        ask(started.client("other"))
    for path in ("/v1/models", "/metrics"):
        assert httpx.get(started.url + path).status_code == 401
    assert httpx.get(f"{started.url}/health").status_code == 200
    headers = {"Authorization": "Bearer sécret".encode()}
    assert httpx.get(f"{started.url}/v1/models", headers=headers).status_code == 200
    started.stop()


def test_metrics(server, client):
    ask(client)
    text = httpx.get(f"{server.url}/metrics").text
    assert 'xformer_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert "xformer_batch_rows_bucket" in text
    httpx.get(f"{server.url}/v1/made-up-by-a-client")
    assert "made-up" not in httpx.get(f"{server.url}/metrics").text


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--max-batch", "0"), "--max-batch must be above 0"), (("--port", "70000"), "--port must be between")],
)
def test_invalid_settings(capsys, words, message):
    with pytest.raises(SystemExit):
        main(["serve", *words])
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- the command, for real


@pytest.fixture
def process(tmp_path):
    """`xformer serve` as a process of its own, with a page: (process, URL)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "xformer_mllm", "serve", "--port", str(port), "--max-tokens", "100"]
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.2)
        assert started.poll() is None, (tmp_path / "log").read_text()
    yield started, url
    started.kill()
    started.wait()


@pytest.mark.slow
def test_abuse_does_not_stop_the_server(process):
    started, url = process
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    port = int(url.rpartition(":")[2])
    expected = ask(client).choices[0].message.content

    bomb = data_url(Image.new("1", (30_000, 30_000)))
    assert len(bomb) < 1_000_000
    with pytest.raises(openai.BadRequestError, match="too large"):
        ask(client, about(bomb))

    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(1000)]
    assert ask(client).choices[0].message.content == expected
    for connection in idle:
        connection.close()

    def gigabyte():
        for _ in range(1000):
            yield b" " * 1_000_000

    try:
        refused = httpx.post(
            f"{url}/v1/chat/completions", content=gigabyte(), headers={"Content-Type": "application/json"}
        )
        assert refused.status_code == 413
    except httpx.TransportError:  # the server hung up before it had read the rest
        pass
    for _ in range(20):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = json.dumps({"model": "xformer", "messages": about(example()), "stream": True, "max_tokens": 100})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        connection.sock.close()
    assert ask(client).choices[0].message.content == expected

    with pytest.raises(httpx.HTTPStatusError):  # the page's own upload has the same limit
        httpx.post(f"{url}/gradio_api/upload", files={"files": b" " * 21_000_000}).raise_for_status()
    assert httpx.get(url).status_code == 200
    assert started.poll() is None


@pytest.mark.slow
def test_sigterm_lets_answers_end(process):
    started, url = process
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    stream = ask(client, stream=True, temperature=2.0, seed=0, max_tokens=100)
    next(iter(stream))
    started.send_signal(signal.SIGTERM)
    pieces = list(stream)
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")
    assert started.wait(30) in (0, -signal.SIGTERM)
    with pytest.raises(openai.APIConnectionError):
        ask(client)


@pytest.mark.slow
def test_transformers_serve(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = str(defaults.shipped_model("xformer"))
    launcher = str(Path(__file__).parents[1] / "examples" / "transformers_serve.py")
    with (tmp_path / "log").open("w") as log:
        words = [sys.executable, launcher, folder, "--port", str(port), "--device", "cpu"]
        started = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://localhost:{port}/health").status_code == 200:
                    break
            assert started.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
        questions = (QUESTION, "How many objects are there in the image?")
        asked = inference.ask(AskConfig(image=str(defaults.example_images()[0]), questions=questions))
        for row in asked:
            messages = about(example(), row["question"])
            assert ask(client, messages, model=folder).choices[0].message.content.strip() == row["answer"]
            pieces = ask(client, messages, model=folder, stream=True)
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces).strip() == row["answer"]
    finally:
        started.kill()
        started.wait()
