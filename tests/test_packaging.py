"""What is shipped: every module, nothing else, and a base install that stays light."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = {"tests", "benchmarks", "examples", "scripts", "build", "dist"}
PACKAGE_DIR: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]


def module_files() -> set[str]:
    """Every Python file of the package, relative to the root."""
    folders = [ROOT] + [
        path
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.name not in NOT_SHIPPED
        if not (path / "pyvenv.cfg").exists()
    ]
    found = [path for folder in folders for path in (folder.glob("*.py") if folder == ROOT else folder.rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix() for path in found}


def correction_files() -> set[str]:
    """The two files of every correction that comes with the package; what lies beside them is for readers."""
    return {path.relative_to(ROOT).as_posix() for path in ROOT.glob("corrections/*/correction.*")}


def page_files() -> set[str]:
    """What the page is put together from."""
    return {path.relative_to(ROOT).as_posix() for path in ROOT.glob("server/web/*")}


def test_every_folder_with_python_files_is_listed() -> None:
    folders = {Path(file).parent.as_posix() for file in module_files()}
    assert folders == set(PACKAGE_DIR.values())
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(packages) == set(PACKAGE_DIR)


def test_folders_cannot_shadow_other_packages() -> None:
    """`kernels` is another package's import name: without an __init__ here it is never found at the root."""
    inits = {file for file in module_files() if file.endswith("__init__.py")}
    assert inits == {"__init__.py", "clients/__init__.py", "server/vllm_plugin/__init__.py"}


@pytest.mark.parametrize(("folder", "knows"), [("model", {"model"}), ("engine", {"engine", "model"})])
def test_data_flows_one_way_through_the_server(folder: str, knows: set[str]) -> None:
    """HTTP knows the engine, which knows the model; neither knows who calls it."""
    files = [*(ROOT / "server" / folder).glob("*.py")]
    imported = {name for file in files for name in re.findall(r"trimtab\.server(?:\.(\w+))?", file.read_text())}
    assert imported == knows


def test_the_server_reads_the_artefact_and_knows_no_trainer() -> None:
    """artefact -> server -> trainer: the trainer runs on the engine, so nothing below may know it."""
    artefact = {"adapter", "atomic", "bank", "correction", "folder", "gate", "identity"}

    def read(files: Iterable[Path], package: str) -> set[str]:
        return {name for file in files for name in re.findall(rf"trimtab\.{package}\.(\w+)", file.read_text())}

    below = [ROOT / "steering" / f"{name}.py" for name in artefact]
    assert read((ROOT / "server").rglob("*.py"), "steering") <= artefact
    assert read(below, "steering") <= artefact
    assert read(below, "server") == set()


def test_data_flows_one_way_through_the_trainer() -> None:
    """problems -> training -> evaluation -> commands: each knows the artefact and what stands before it."""
    folders = ["tasks", "training", "evaluation", "commands"]
    for place, folder in enumerate(folders):
        files = [*(ROOT / "steering" / folder).glob("*.py")]
        imported = {name for file in files for name in re.findall(r"trimtab\.steering\.(\w+)", file.read_text())}
        assert files
        assert imported.isdisjoint(folders[place + 1 :])


def test_the_base_import_is_light() -> None:
    program = """
import sys, trimtab
from trimtab.clients import Client
Client().close()
heavy = {"torch", "numpy", "transformers", "safetensors", "fastapi", "starlette", "uvicorn", "triton", "jinja2"}
print(*sorted(heavy & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", check=False)
    assert (ran.returncode, ran.stdout.split(), ran.stderr) == (0, [], "")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel of a copy of the tree (building writes into it), made offline with what is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in (
        *module_files(),
        *correction_files(),
        *page_files(),
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "py.typed",
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    ran = subprocess.run([*pip, "-w", folder, source], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_the_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    held = {name.removeprefix("trimtab/") for name in wheel.namelist() if ".dist-info/" not in name}
    assert module_files() <= held
    assert held - module_files() == {"py.typed", *correction_files(), *page_files()}
    assert all(name.startswith("trimtab") for name in wheel.namelist())


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (metadata,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/METADATA"))
    assert "License-Expression: Apache-2.0" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert sorted(line.split()[1].split("<")[0].split(">")[0] for line in required) == ["httpx", "pydantic"]
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())
