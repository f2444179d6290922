"""The frame of every page: head, title, sections, footer. Nothing in it is fetched."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from xformer_mllm.report import markup

PAPER = "https://arxiv.org/abs/2407.13851"
STYLE = Path(__file__).with_name("style.css")


def document(title: str, introduction: str, sections: Iterable[str], style: str = "") -> str:
    """A page as one HTML string. sections: HTML, empty ones are left out; style: CSS beside that of every page."""
    body = "\n".join(section for section in sections if section)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{markup.paragraph(introduction, "lead")}
</header>
<main>
{body}
</main>
<footer><p>The idea: <a href="{PAPER}">Swetha et al., X-Former, ECCV 2024</a>.</p></footer>
</body>
</html>
"""
