"""The examples run as they stand."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("use_model.py", "What colour is the triangle? yellow"),
        ("swap_encoder.py", "Z' = Z_q before training: True"),
        ("train_variant.py", "xformer ask IMAGE QUESTION --model"),
    ],
)
def test_script_runs(name, said, tmp_path):
    words = [sys.executable, str(EXAMPLES / name)]
    found = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.returncode == 0, found.stderr
    assert said in found.stdout


def test_notebook_runs(tmp_path):
    notebook = nbformat.read(EXAMPLES / "xformer.ipynb", as_version=4)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (answer,) = [output for output in notebook.cells[-1].outputs if output.output_type == "execute_result"]
    assert answer["data"]["text/plain"] == "'4'"
