"""Reading a store in an environment that has the library's own needs and nothing else.

Installs from the package index, so these tests need one within reach.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.wheel import build_wheel, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

READ_FIRST_RECORD = """
import importlib.util, json, sys
import logitstore
from logitstore.store.logit_store import LogitStore
store = LogitStore.open(sys.argv[1])
record = store[0]
heavy = ("torch", "ray", "transformers", "vllm")
print(json.dumps({
    "heavy": [name for name in heavy if importlib.util.find_spec(name)],
    "package": logitstore.__file__,
    "records": len(store),
    "token_ids": record.token_ids.tolist(),
    "support_ids": record.signal.support_ids.tolist(),
}))
"""


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of a new environment with the wheel in it, extras left out."""
    folder = tmp_path_factory.mktemp("light")
    run([sys.executable, "-m", "venv", str(folder / "env")])
    programs = folder / "env" / "bin"
    run([str(programs / "python"), "-m", "pip", "install", "--quiet", str(build_wheel(folder))])
    return programs


def run_light(command: list[str], cwd: Path) -> str:
    """Run outside of the checkout, warnings being errors, with nothing of this process's Python settings."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return run(command, cwd=cwd, env=env | {"PYTHONWARNINGS": "error"})


def test_store_in_a_light_environment_opens_and_reads(light: Path, small_store_url: str, tmp_path: Path) -> None:
    from logitstore.store.logit_store import LogitStore

    found = json.loads(run_light([str(light / "python"), "-c", READ_FIRST_RECORD, small_store_url], tmp_path))
    store = LogitStore.open(small_store_url)
    assert found["heavy"] == []
    assert Path(found["package"]).is_relative_to(light.parent)
    assert found["records"] == len(store)
    assert found["token_ids"] == store[0].token_ids.tolist()
    assert found["support_ids"] == store[0].signal.support_ids.tolist()


def test_command_in_a_light_environment_shows_its_help(light: Path, tmp_path: Path) -> None:
    help_text = run_light([str(light / "logitstore"), "--help"], tmp_path)
    assert "inspect" in help_text
    assert "capture" in help_text


def test_inspect_in_a_light_environment_prints_one_json_document(
    light: Path, small_store_url: str, tmp_path: Path
) -> None:
    from logitstore.store.logit_store import LogitStore

    found = json.loads(run_light([str(light / "logitstore"), "inspect", small_store_url, "--json"], tmp_path))
    assert found["records"] == len(LogitStore.open(small_store_url))
