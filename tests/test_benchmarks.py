"""benchmarks/: each imports what the package still has (their runs take minutes)."""

import runpy
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))
OTHER_ENVIRONMENT = {"lavis_stage1.py"}  # runs beside LAVIS's own packages


@pytest.mark.parametrize(
    "path", [p for p in BENCHMARKS if p.name not in OTHER_ENVIRONMENT], ids=lambda path: path.name
)
def test_imports(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)  # as for `python benchmarks/…`: some share a module
    assert "main" in runpy.run_path(str(path), run_name="imported")
