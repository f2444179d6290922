"""Pieces of HTML that several sections need. Titles and texts are escaped here; contents and cells are HTML already."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from xformer_mllm.report.contents import BLIND, Report
from xformer_mllm.report.wording import display_name


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def as_json(values: Mapping[str, Any]) -> str:
    return f"<pre>{escape(json.dumps(values, indent=2, default=str, ensure_ascii=False))}</pre>"


def key(report: Report, variant: str) -> str:
    """The dot in a variant's colour."""
    return f'<i class="key v{report.variants.index(variant) % 8}"></i>'


def legend(report: Report, variants: Sequence[str], blind: Sequence[str] = ()) -> str:
    """What the colours of `variants` and the bars of `blind` (keys of BLIND) stand for."""
    items = [f"<span>{key(report, variant)}{escape(display_name(variant))}</span>" for variant in variants]
    items += [f'<span><i class="key blind {name}"></i>{escape(BLIND[name][1])}</span>' for name in blind]
    return f'<p class="legend">{"".join(items)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, kind: str = "numbers") -> str:
    """Cells are HTML: the caller escapes them. The first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}">{title}<thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def image(image: Image.Image, alternative: str) -> str:
    """PNG as a data URI; small images are enlarged by the browser without smoothing."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<img src="data:image/png;base64,{data}" width="{image.width}" height="{image.height}" '
        f'alt="{escape(alternative, quote=True)}">'
    )
