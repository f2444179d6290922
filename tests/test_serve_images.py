"""The images of a request: formats, sizes, and which hosts are fetched from."""

import base64
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anyio
import pytest
from PIL import Image

from xformer_mllm.serve import images
from xformer_mllm.serve.images import ImageLimits, decode, image_from, is_public


def content(form: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, format=form)
    return file.getvalue()


LIMITS = ImageLimits(max_pixels=1000, max_bytes=10_000, url_hosts=("images.example",))


def read(url: str, limits: ImageLimits = LIMITS) -> Image.Image:
    return anyio.run(image_from, url, limits)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats(form):
    image = decode(content(form), 1000)
    assert (image.mode, image.size) == ("RGB", (8, 8))


def test_formats_that_start_programs_are_refused():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    with pytest.raises(ValueError, match="is a EPS; send a PNG"):
        decode(eps, 1000)


def test_pixels_are_counted_before_decoding(monkeypatch):
    monkeypatch.setattr(images, "load_image", lambda image: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="40 x 40 pixels; at most 1,000"):
        decode(content(size=(40, 40)), 1000)


def test_data_urls():
    encoded = base64.b64encode(content()).decode()
    assert read(f"data:image/png;base64,{encoded}").size == (8, 8)
    assert read(f"data:image/png;base64,{encoded[:20]}\n{encoded[20:]}").size == (8, 8)
    assert read("data:image/gif," + "".join(f"%{byte:02x}" for byte in content("GIF"))).size == (8, 8)
    with pytest.raises(ValueError, match="no comma"):
        read("data:image/png;base64")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.20.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),  # a cloud's metadata
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::5db8:d822", True),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://other.example/a.png", "not fetched from this host"),
        ("https://images.example.evil.example/a.png", "not fetched from this host"),
        ("https://images.example@127.0.0.1/a.png", "not fetched from this host"),
        ("http://images.example:99999/a.png", "not valid"),
        ("ftp://images.example/a.png", "must be a data URL"),
        ("http://", "not fetched from this host"),
    ],
)
def test_other_hosts_are_not_fetched(url, message):
    with pytest.raises(ValueError, match=message):
        read(url)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "0x7f.1"])
def test_an_allowed_host_with_a_private_address_is_not_fetched(host):
    with pytest.raises(ValueError, match=r"no public address|was not found"):
        read(f"http://{host}/a.png", ImageLimits(1000, 10_000, (host,)))


class Pages(BaseHTTPRequestHandler):
    seen: list[str] = []

    def do_GET(self):
        self.seen.append(f"{self.headers['Host']}{self.path}")
        self.send_response(302 if self.path == "/moved" else 404 if self.path == "/none" else 200)
        if self.path == "/moved":
            self.send_header("Location", "/a.png")
        self.end_headers()
        self.wfile.write({"/large": b" " * 20_000, "/text": b"no image"}.get(self.path, content()))

    def log_message(self, *args):
        pass


@pytest.fixture
def host(monkeypatch):
    """images.example as if it had a public address; its port."""

    async def loopback(host: str, port: int) -> str:
        return "127.0.0.1"

    monkeypatch.setattr(images, "_public_address", loopback)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def test_an_allowed_host_is_fetched_by_its_checked_address(host):
    assert read(f"http://Images.Example:{host}/a.png?x=1#part").size == (8, 8)
    assert Pages.seen[-1] == f"images.example:{host}/a.png?x=1"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/moved", "status 302"),
        ("/none", "status 404"),
        ("/large", "larger than 10,000 bytes"),
        ("/text", "not a readable image"),
    ],
)
def test_what_is_fetched_is_limited(host, path, message):
    with pytest.raises(ValueError, match=message):
        read(f"http://images.example:{host}{path}")


def test_a_host_that_does_not_answer(monkeypatch):
    async def loopback(host: str, port: int) -> str:
        return "127.0.0.1"

    monkeypatch.setattr(images, "_public_address", loopback)
    with pytest.raises(ValueError, match="could not be fetched"):
        read("http://images.example:9/a.png")
