"""What the tests of `xformer convert` share: `pytest_plugins = ["published_files"]`."""

import pytest
from published import BLIP2, run, save_tiny


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder of tiny random checkpoints in the published layouts."""
    folder = tmp_path_factory.mktemp("sources")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def converted(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "stage2"
    assert run(files, output, *BLIP2, "--dtype", "float32") == 0
    return output
