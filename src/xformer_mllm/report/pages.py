"""Render the templates in `templates/`, with all text escaped."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from xformer_mllm.report.wording import image_name, plain

PAPER = "https://arxiv.org/abs/2407.13851"


def render_page(template: str, **values: Any) -> str:
    """A page as one HTML string. values: what the template uses; `title` and `introduction` always."""
    return _ENVIRONMENT.get_template(template).render(paper=PAPER, **values)


def _png(image: Image.Image) -> str:
    """The image as a data URI."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _json(values: Any) -> str:
    return json.dumps(values, indent=2, default=str, ensure_ascii=False)


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"png": _png, "json": _json, "plain": plain, "image_name": image_name}
