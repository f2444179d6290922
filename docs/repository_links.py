"""A hook of mkdocs: links to files outside docs/ and to folders, which work on GitHub, lead to the repository.

A link to a file that does not exist is a warning, and thus an error of `mkdocs build --strict`.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

CODE = r"```.*?```|`[^`\n]*`"
LINK = re.compile(rf"{CODE}|(?<=\]\()(?![a-z]+:|[#/])[^)\s#]+", re.DOTALL)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Rewrite the relative links of `page` that lead to something that is not part of the site."""
    docs = Path(config.docs_dir)

    def rewrite(match: re.Match[str]) -> str:
        link = match[0]
        target = Path(os.path.normpath(docs / page.file.src_uri / ".." / link))
        if link.startswith("`") or (target.is_file() and target.is_relative_to(docs)):
            return link
        if not target.exists():
            logging.getLogger("mkdocs.hooks").warning(f"{page.file.src_uri}: broken link {link}")
            return link
        kind = "tree" if target.is_dir() else "blob"
        return f"{config.repo_url}/{kind}/main/{target.relative_to(docs.parent).as_posix()}"

    return LINK.sub(rewrite, markdown)
