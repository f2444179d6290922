"""The files of a Gradio Space around its models: the page and API of `xformer serve` on the Space's port.

The package is copied into the Space, with its metadata, because it is not on PyPI.
"""

import shutil
from collections.abc import Mapping
from importlib.metadata import distribution, requires, version
from pathlib import Path

from huggingface_hub import SpaceCardData
from packaging.requirements import Requirement

from xformer_mllm.commands import ExportConfig
from xformer_mllm.files import write_whole

MODELS = "models"
EXAMPLES = "examples"
PORT = 7860  # a Space's
PACKAGE = Path(__file__).parents[1]

APP = '''\
"""X-Former's page and OpenAI-compatible API, as `xformer serve` gives them."""

from pathlib import Path

from xformer_mllm.commands import ServeConfig
from xformer_mllm.serve.server import serve

here = Path(__file__).parent
serve(
    ServeConfig(
        {arguments},
        host="0.0.0.0",
        port={port},
    )
)
'''


def write_space(folder: Path, names: Mapping[str, str], settings: ExportConfig) -> None:
    """Write what a Space needs besides its models.

    Args:
        folder: of the Space, with the exported models in it.
        names: role in `ServeConfig` -> name of the model's folder.
        settings: licence, name and examples.
    """
    arguments = [f'{role}=here / "{MODELS}" / "{name}"' for role, name in names.items()]
    if settings.examples is not None:
        shutil.copytree(settings.examples, folder / EXAMPLES)
        arguments.append(f'examples=here / "{EXAMPLES}"')
    write_whole(folder / "app.py", APP.format(arguments=",\n        ".join(arguments), port=PORT))
    needed = map(Requirement, requires("xformer-mllm") or [])
    lines = [f"{line.name}{line.specifier}" for line in needed if _for_serving(line)]
    write_whole(folder / "requirements.txt", "\n".join(lines) + "\n")
    write_whole(folder / ".gitattributes", "*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.png filter=lfs\n")
    write_whole(folder / "README.md", _card(settings, names))
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = folder / f"xformer_mllm-{version('xformer-mllm')}.dist-info"
    metadata.mkdir()
    write_whole(metadata / "METADATA", str(distribution("xformer-mllm").read_text("METADATA")))


def _for_serving(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": "serve"})


def _card(settings: ExportConfig, names: Mapping[str, str]) -> str:
    card = SpaceCardData(
        title=(settings.repo_id or names["model"]).rpartition("/")[2],
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version="3.11",
        app_file="app.py",
        license=settings.license,
        short_description="X-Former: CLIP and MAE features for a language model",
    )
    models = "\n".join(f"- [`{MODELS}/{name}`]({MODELS}/{name}/README.md)" for name in names.values())
    return f"""\
---
{card.to_yaml()}
---

The page and the OpenAI-compatible API of `xformer serve` (xformer-mllm {version("xformer-mllm")}). The API is at `/v1`. To
protect both, set the secret `XFORMER_API_KEY`, which is also the page's password.

Models:

{models}
"""
