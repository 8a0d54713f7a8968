"""Every example runs, as its own text says, and OpenAI's own clients along their ordinary paths (official.py and .mjs),
against a real server over a tiny random model.

The libraries that they show live in an environment of their own (`pip install '.[examples]'`), as these pin what ours
does not: TRIMTAB_EXAMPLES_PYTHON is its interpreter, and TRIMTAB_EXAMPLES_NODE a folder in which `npm install openai`
ran; TRIMTAB_OPENAI_PYTHONS lists interpreters with other versions of openai. What is not installed is skipped, by name.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripted import loopback
from tiny import tiny_base, tiny_correction
from trimtab.server.app import create_app
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.engine import Engine
from trimtab.steering.bank import Bank

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
TESTS = ROOT / "tests"
OURS = "trimtab"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    base = tiny_base(max_position_embeddings=2048)  # a byte is a token: tools take a thousand of them
    bank = Bank(base.hidden, base.device)
    bank.add(tiny_correction(base, "bold"))
    engine = Engine(base, bank, EngineConfig(slots=4, max_model_len=2048))
    with loopback(create_app(engine, base, bank, api_keys=["secret"]), engine) as served:
        yield served


def environment(url: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    return kept | {"TRIMTAB_BASE_URL": f"{url}/v1", "TRIMTAB_API_KEY": "secret"}


def libraries(file: Path) -> set[str]:
    """What a Python file imports at its top, but for the standard library."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def interpreter(needed: set[str]) -> str:
    """The examples' own, but for what shows our client. Skips where it lacks a library."""
    python = sys.executable if OURS in needed else os.environ.get("TRIMTAB_EXAMPLES_PYTHON", sys.executable)
    program = "import importlib.util, sys; print(*[n for n in sys.argv[1:] if importlib.util.find_spec(n) is None])"
    found = subprocess.run([python, "-c", program, *sorted(needed)], capture_output=True, text=True, check=True)
    if found.stdout.strip():
        pytest.skip(f"not installed: {found.stdout.strip()}")
    return python


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_a_python_example_runs(name: str, url: str, tmp_path: Path) -> None:
    python = interpreter(libraries(EXAMPLES / name))
    ran = subprocess.run(
        [python, EXAMPLES / name], cwd=tmp_path, capture_output=True, text=True, env=environment(url), check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def node_program(file: Path, folder: Path) -> list[str | Path]:
    """The command that runs a copy in a folder with the package openai, as modules are looked for beside the file."""
    node, installed = shutil.which("node"), os.environ.get("TRIMTAB_EXAMPLES_NODE")
    if node is None or installed is None or not (Path(installed) / "node_modules" / "openai").is_dir():
        pytest.skip("not installed: node with the package openai")
    shutil.copy(file, folder)
    (folder / "node_modules").symlink_to(Path(installed) / "node_modules")
    return [node, folder / file.name]


def test_the_node_example_runs(url: str, tmp_path: Path) -> None:
    command = node_program(EXAMPLES / "openai_node.mjs", tmp_path)
    ran = subprocess.run(command, capture_output=True, text=True, env=environment(url), check=False)
    assert ran.returncode == 0, ran.stderr
    assert "steps; bold acted at" in ran.stdout


def faults(command: list[str | Path], url: str) -> dict[str, str]:
    """What one of the scripts could not do."""
    ran = subprocess.run(command, capture_output=True, text=True, env=environment(url), check=False)
    assert ran.returncode == 0, ran.stderr
    return {path: said for path, said in json.loads(ran.stdout).items() if path != "version" and said != "ok"}


@pytest.mark.parametrize("python", [sys.executable, *os.environ.get("TRIMTAB_OPENAI_PYTHONS", "").split()])
def test_openais_client_for_python_takes_its_ordinary_paths(python: str, url: str) -> None:
    if subprocess.run([python, "-c", "import openai"], capture_output=True, check=False).returncode:
        pytest.skip(f"not installed: openai in {python}")
    assert faults([python, TESTS / "official.py"], url) == {}


def test_openais_client_for_node_takes_its_ordinary_paths(url: str, tmp_path: Path) -> None:
    assert faults(node_program(TESTS / "official.mjs", tmp_path), url) == {}


def test_every_library_that_is_shown_is_in_the_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["examples"]
    told = {line.partition(">")[0].replace("-", "_") for line in extras}
    shown = set().union(*(libraries(path) for path in EXAMPLES.glob("*.py")))
    assert shown - {OURS, "pydantic", "langchain_core"} == told  # the others come with these
