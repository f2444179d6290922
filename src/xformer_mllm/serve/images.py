"""Images of a request: from data URLs, and from the hosts that the operator allows.

Nothing is fetched unless `--allow-url-host` names the host. Even then its address must be public, so that a name that
points into the operator's network is refused; redirects are not followed.
"""

import base64
import binascii
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes, urlsplit

import anyio
import httpx
from PIL import Image

from xformer_mllm.model.images import load_image, open_file

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO")
"""Formats that are decoded. Pillow knows others that start programs (EPS) or are rarely tested."""

FETCH_SECONDS = 10


@dataclass(frozen=True)
class ImageLimits:
    """What is accepted. url_hosts: from which images are fetched; max_bytes of a fetched file."""

    max_pixels: int
    max_bytes: int
    url_hosts: Sequence[str] = ()


async def image_from(url: str, limits: ImageLimits) -> Image.Image:
    """Read a data URL, or fetch an image from an allowed host: -> RGB.

    Raises ValueError if it is no image, too large, or not allowed.
    """
    if url.startswith("data:"):
        content = _data(url)
    elif url.startswith(("http://", "https://")):
        content = await fetch(url, limits)
    else:
        raise ValueError("an image must be a data URL: data:image/png;base64,…")
    return await anyio.to_thread.run_sync(decode, content, limits.max_pixels)


def decode(content: bytes, max_pixels: int) -> Image.Image:
    """Decode an image file: -> RGB. Raises ValueError before decoding if it is too large or of another format."""
    image = open_file(content, "the image")
    if image.format not in FORMATS:
        raise ValueError(f"the image is a {image.format}; send a PNG, JPEG or WebP")
    if image.width * image.height > max_pixels:
        raise ValueError(
            f"the image has {image.width} x {image.height} pixels; at most {max_pixels:,} are accepted, make it smaller"
        )
    return load_image(image)


def _data(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise ValueError("the data URL has no comma; expected data:image/png;base64,…")
    if not head.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"the data URL is not valid base64 ({error})") from error


async def fetch(url: str, limits: ImageLimits) -> bytes:
    """Fetch a file from an allowed host, at its public address, without following redirects.

    The connection goes to the address that was checked, so a second resolution cannot lead elsewhere.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise ValueError(f"the image's URL is not valid ({error})") from error
    host = (parts.hostname or "").rstrip(".").lower()
    if host not in {allowed.lower() for allowed in limits.url_hosts}:
        raise ValueError(
            "images are not fetched from this host; send a data URL (the server's operator can allow it with "
            "--allow-url-host)"
        )
    address = await _public_address(host, port)
    netloc = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    target = parts._replace(netloc=netloc, fragment="").geturl()
    content = bytearray()
    try:
        with anyio.fail_after(FETCH_SECONDS):
            async with (
                httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=FETCH_SECONDS) as client,
                client.stream(
                    "GET",
                    target,
                    headers={"Host": host if parts.port is None else f"{host}:{port}", "Accept": "image/*"},
                    extensions={"sni_hostname": host},
                ) as response,
            ):
                if response.status_code != 200:
                    raise ValueError(f"the image's host answered with status {response.status_code}")
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > limits.max_bytes:
                        raise ValueError(f"the image's file is larger than {limits.max_bytes:,} bytes")
    except (httpx.HTTPError, TimeoutError) as error:
        raise ValueError(f"the image could not be fetched ({type(error).__name__})") from error
    return bytes(content)


async def _public_address(host: str, port: int) -> str:
    """Resolve a host. Raises ValueError unless all its addresses are public."""
    try:
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"the image's host was not found ({error})") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise ValueError("the image's host has no public address")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's, also if it wraps another (IPv4 in IPv6)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner:
            return is_public(str(inner))
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip.is_global and not ip.is_multicast
