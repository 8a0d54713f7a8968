"""The command line: light to start, and a mistake is one line and exit code 1."""

import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tiny import tiny_base, tiny_correction
from trimtab.cli import build_parser, main
from trimtab.steering import folder
from trimtab.steering.folder import save


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    program = """
import sys
from trimtab.cli import build_parser
print(build_parser().format_help())
heavy = {"torch", "transformers", "fastapi", "starlette", "uvicorn", "triton", "safetensors"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert all(command in ran.stdout for command in ("serve", "fit", "distill", "eval", "inspect"))


def test_a_mistake_is_one_line_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "/no/such/model", "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("trimtab: ")
    assert error.count("\n") == 1
    assert "/no/such/model" in error


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/run/features/00000.safetensors")

    monkeypatch.setattr(folder, "load", full)
    assert main(["inspect", "x"]) == 1
    shown = capsys.readouterr().err
    assert shown == "trimtab: runs/x/run/features/00000.safetensors: No space left on device\n"


def test_a_report_of_another_shape_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.save(dataclasses.replace(tiny_correction(tiny_base()), report={"verdict": {}}), tmp_path)
    assert main(["inspect", str(tmp_path)]) == 1
    assert "the report in its correction.json lacks 'sampling'" in capsys.readouterr().err
    odd = {"sampling": {}, "verdict": {}, "strengths": []}
    folder.save(dataclasses.replace(tiny_correction(tiny_base()), report=odd), tmp_path)
    assert main(["inspect", str(tmp_path)]) == 1
    assert "the report in its correction.json cannot be shown" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["sing"], ["serve", "--port", "many"]])
def test_wrong_words_are_argparses(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 1
    assert "uvicorn is not installed: in Trimtab's checkout, pip install '.[server]'" in capsys.readouterr().err


def test_flags_have_vllms_names() -> None:
    flags = (
        "--host h --port 1 --dtype float32 --max-model-len 2 --max-num-seqs 3 --max-num-batched-tokens 4 --api-key k"
    )
    args = build_parser().parse_args(["serve", "m", *flags.split(), "--served-model-name", "a", "b"])
    assert (args.model, args.host, args.port, args.dtype) == ("m", "h", 1, "float32")
    assert (args.max_model_len, args.max_num_seqs, args.max_num_batched_tokens) == (2, 3, 4)
    assert (args.api_key, args.served_model_name) == (["k"], ["a", "b"])


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    """As in `trimtab inspect DIR | head -1`."""
    save(tiny_correction(tiny_base()), tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "trimtab.cli", "inspect", str(tmp_path)]
    ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd="/", check=False)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_full_gpu_ends_in_one_line_and_other_failures_in_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = type("OutOfMemoryError", (RuntimeError,), {})  # torch's, which the command line does not import
    command = mock.Mock(side_effect=full("CUDA out of memory. Tried to allocate 2 GiB. More words."))
    monkeypatch.setattr("trimtab.steering.commands.fitting.run_inspect", command)
    assert main(["inspect", "somewhere"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("trimtab: out of memory: CUDA out of memory; lower --slots")
    assert told.count("\n") == 1
    command.side_effect = RuntimeError("another")
    with pytest.raises(RuntimeError, match="another"):
        main(["inspect", "somewhere"])
