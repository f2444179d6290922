"""The web page of `xformer serve`: its functions over HTTP, and (slow) every control in headless Chromium."""

import shutil
import threading
import time

import httpx
import pytest
import uvicorn
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from xformer_mllm import defaults, inference
from xformer_mllm.commands import AskConfig, CaptionConfig, ReconstructConfig, ServeConfig
from xformer_mllm.serve import server as server_module
from xformer_mllm.serve.api import create_app
from xformer_mllm.serve.engine import Engine
from xformer_mllm.serve.page import ALTERNATIVES, mount_page

QUESTION = "What texture does the yellow triangle have?"
EXAMPLE = str(defaults.example_images()[0])


def start(config: ServeConfig):
    """(URL, function that stops it)."""
    listening = server_module.listen("127.0.0.1", 0)
    models = server_module.load(config)
    engine, settings = Engine(models), server_module.settings_of(config, models)
    app = mount_page(create_app(engine, settings), engine, settings, server_module.examples_of(config))
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)

    def stop() -> None:
        running.should_exit = True
        thread.join(20)

    return f"http://127.0.0.1:{listening.getsockname()[1]}", stop


@pytest.fixture(scope="module")
def url():
    address, stop = start(ServeConfig())
    yield address
    stop()


@pytest.fixture(scope="module")
def page(url):
    return Client(url, verbose=False)


def test_both_models_answer_the_question(page):
    of_xformer, of_qformer = page.predict(handle_file(EXAMPLE), QUESTION, api_name="/ask")
    (asked,) = inference.ask(AskConfig(image=EXAMPLE, questions=(QUESTION,)))
    assert of_xformer["label"] == asked["answer"]
    probabilities = {row["label"]: row["confidence"] for row in of_xformer["confidences"]}
    assert len(probabilities) == ALTERNATIVES
    assert probabilities[asked["answer"]] == pytest.approx(asked["probability"], abs=0.02)  # bf16
    assert sum(probabilities.values()) <= 1.0
    assert of_qformer["confidences"] != of_xformer["confidences"]


def test_description(page):
    (row,) = inference.caption(CaptionConfig(images=(EXAMPLE,)))
    assert page.predict(handle_file(EXAMPLE), api_name="/describe") == row["caption"]


def test_attention(page):
    with Image.open(page.predict(handle_file(EXAMPLE), QUESTION, api_name="/look")) as sheet:
        assert sheet.width > 500
        assert len(sheet.getcolors(10**6)) > 100  # type: ignore[arg-type]


def test_reconstruction(page, tmp_path):
    inference.reconstruct(ReconstructConfig(images=(EXAMPLE,), output=tmp_path / "expected.png", seed=3))
    found = page.predict(handle_file(EXAMPLE), 0.5, 3, api_name="/rebuild")
    with Image.open(found) as image, Image.open(tmp_path / "expected.png") as expected:
        assert image.convert("RGB").tobytes() == expected.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"), [((None, QUESTION), "Choose an image"), ((EXAMPLE, " "), "Type a question")]
)
def test_what_is_missing_is_said(page, arguments, message):
    image, question = arguments
    with pytest.raises(AppError, match=message):
        page.predict(image and handle_file(image), question, api_name="/ask")


def test_a_large_image_is_refused(page, tmp_path):
    Image.new("1", (8000, 8000)).save(tmp_path / "large.png")
    with pytest.raises(AppError, match="at most 32,000,000"):
        page.predict(handle_file(str(tmp_path / "large.png")), QUESTION, api_name="/ask")


def test_the_api_is_beside_the_page(url):
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "xformer"
    assert "fonts.googleapis" not in httpx.get(url).text


def test_a_key_is_the_password_of_the_page():
    address, stop = start(ServeConfig(api_key="sesame"))
    for path in ("/config", "/gradio_api/info"):
        assert httpx.get(address + path).status_code == 401
    wrong = httpx.post(f"{address}/login", data={"username": "me", "password": "other"})
    assert wrong.status_code == 400
    right = httpx.post(f"{address}/login", data={"username": "me", "password": "sesame"})
    assert right.status_code == 200
    assert httpx.get(f"{address}/config", cookies=right.cookies).status_code == 200
    stop()


def test_a_model_without_baseline_and_stage_1(runs):
    address, stop = start(ServeConfig(model=runs / "stage2"))
    client = Client(address, verbose=False)
    answer = client.predict(handle_file(EXAMPLE), "How many?", api_name="/ask")
    assert answer["label"]
    with Image.open(client.predict(handle_file(EXAMPLE), "", api_name="/look")) as sheet:
        assert sheet.width > 500
    stop()


CHROMIUM = shutil.which("chromium")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize(("scheme", "width", "height"), [("light", 1200, 900), ("dark", 390, 844)])
def test_every_control_in_a_browser(url, scheme, width, height):
    sync_api = pytest.importorskip("playwright.sync_api")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    complaints: list[str] = []
    requests: list[str] = []

    def check_accessibility() -> None:
        found = axe.run(page).response["violations"]
        assert [(rule["id"], rule["nodes"]) for rule in found if rule["impact"] in ("serious", "critical")] == []

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": height})
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        expect = sync_api.expect
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)

        page.get_by_role("button", name="Image 2").click()
        page.get_by_label("Question").fill("How many objects are there in the image?")
        page.get_by_label("Question").press("Enter")
        expect(page.locator("#answer-0 h2")).to_have_text("4")
        expect(page.locator("#answer-1 h2")).not_to_be_empty()
        page.get_by_role("button", name="Image 1").click()
        page.get_by_role("button", name=QUESTION).click()
        page.get_by_role("button", name="Ask", exact=True).focus()
        page.keyboard.press("Enter")
        expect(page.locator("#answer-0 h2")).to_have_text("checked")
        page.get_by_role("button", name="Describe").click()
        expect(page.locator("#caption textarea, #caption input")).to_have_value("green circles")
        check_accessibility()

        page.get_by_role("tab", name="Attention").click()
        page.get_by_role("button", name="Show attention").click()
        expect(page.locator("#maps img")).to_be_visible()
        check_accessibility()

        page.get_by_role("tab", name="Reconstruct").click()
        page.get_by_label("range slider for Share").fill("0.7")
        page.get_by_role("button", name="Reconstruct", exact=True).click()
        expect(page.locator("#panels img")).to_be_visible()
        check_accessibility()

        page.get_by_role("tab", name="Ask").click()
        page.locator("input[type=file]").first.set_input_files(EXAMPLE)
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator("#answer-0 h2")).to_have_text("checked")
        page.get_by_label("Remove").or_(page.get_by_label("Clear")).first.click()
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.get_by_text("Choose an image first.")).to_be_visible()
        browser.close()
    assert complaints == []
    assert [request for request in requests if not request.startswith((url, "data:", "blob:"))] == []
