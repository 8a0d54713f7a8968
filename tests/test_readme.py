"""The README tells the truth: its commands run in its order, and its Python runs against the server it starts.

Sizes are cut by options added at the end of a line, which also name another model where it asks for a LoRA. Nothing
else is changed but MODEL, TUNED, DIR and the port. CI runs `scripts/setup` and `scripts/demo`; the image's two commands
need a container engine.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fitting import write_task
from served import serving
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = ["--problems", "10", "--samples", "4", "--validation-problems", "2", "--validation-samples", "1"]
SMALL += ["--test-problems", "2", "--test-samples", "1", "--max-tokens", "16", "--slots", "40"]
# With a LoRA or a teacher the demo's model takes minutes a line. test_routes and test_adapting show what these routes
# make; here it is shown that the README's lines are accepted and end in a correction, for which a tiny model will do.
# It knows nothing, and so is graded by chance.
TINY = [*SMALL, "--model", "tiny", "--task", "task.jsonl", "--verifier", "odd_grading:odd", "--temperature", "1.0"]
# A LoRA of six steps must learn fast to differ from the base: a head is only made of a teacher that does.
LORA = [*TINY, "--lora-warmup", "1", "--lora-rate", "0.05", "--lora-kl-limit", "0"]
SHORT = {"fit": SMALL, "distill": [*SMALL, "--teacher-samples", "1"]}
SHORT |= {"eval": ["--problems", "2", "--samples", "1", "--skip", "0"]}
SHORT |= {"inspect": [], "calibrate": ["--problems", "2", "--max-tokens", "12"]}

pytestmark = pytest.mark.model


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(name: str) -> list[list[str]]:
    """The lines of the README's shell blocks that call `trimtab name`."""
    whole = [block.replace("\\\n", " ") for block in blocks("bash")]
    lines = [shlex.split(line, comments=True) for block in whole for line in block.splitlines()]
    return [line for line in lines if line[:2] == ["trimtab", name]]


def run(command: list[str], folder: Path) -> str:
    words = [sys.executable, "-m", "trimtab.cli", *command[1:]]
    ran = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{shlex.join(command)}\n{ran.stderr}"
    return ran.stdout


def test_train_then_serve_then_ask_as_the_readme_says(tmp_path: Path) -> None:
    sums = [
        {"id": i, "prompt": f"Q: What is {i} + 1?\nA: {i + 1}\nQ: What is {i} + 1?\nA:", "answer": str(i + 1)}
        for i in range(40)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sums))
    write_task(tmp_path)
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    for name in SHORT:
        found = commands(name)
        assert found, f"the README shows no `trimtab {name}`"
        for command in found:
            named = {"MODEL": "tiny" if name == "distill" else "demo", "TUNED": "corrections/better/lora"}
            words = [named.get(word, word) for word in command] + (LORA if "lora" in command else SHORT[name])
            if name in ("fit", "distill") and "--tier" not in command:
                words += ["--epochs", "2", *(["--teacher-samples", "1"] if "lora" in command else [])]
            assert run(words, tmp_path).strip()
            if name in ("fit", "distill"):
                assert (tmp_path / words[words.index("--out") + 1] / "correction.json").exists()
    (serve, *rest) = commands("serve")
    assert rest == []
    plain = serve[: serve.index("--correction") + 2]
    made = [{"MODEL": "demo", "DIR": "corrections/mine"}.get(word, word) for word in plain]
    with serving(made[2:], tmp_path) as served:
        (program,) = blocks("python")
        assert "http://127.0.0.1:8000" in program
        program = program.replace("http://127.0.0.1:8000", served.url)
        environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        ran = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
        )
        assert ran.returncode == 0, ran.stderr
        assert "correction='mine'" in ran.stdout


def test_every_file_in_the_tree_exists_and_every_top_level_folder_of_python_is_in_it() -> None:
    (tree,) = re.findall(r"```\n(server/ .*?)```", README, re.DOTALL)
    folder, named = "", set()
    for line in tree.splitlines():
        if top := re.match(r"(\w+)/ ", line):
            folder = top[1]
        elif below := re.match(r"  (\w+)/ ", line):
            folder = f"{folder.split('/')[0]}/{below[1]}"
        elif not line.startswith(" "):
            folder = ""
        files = set(re.findall(r"\b\w+\.py\b", line)) - {"test_.py"}
        named |= {f"{folder}/{name}" if folder else name for name in files}
    missing = {path for path in named if not (ROOT / path).exists()}
    assert missing == set()
    assert {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))} <= set(
        re.findall(r"^(\w+)/", tree, re.MULTILINE)
    )
