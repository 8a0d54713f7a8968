"""What is said of a machine is the same each time, and a run adds its command."""

import sys

import pytest

from trimtab.steering.machine import describe, describe_run, hardware, versions


def test_one_machine_is_described_the_same_twice() -> None:
    assert describe() == describe()
    assert describe()["cores"] >= 1


def test_a_run_names_its_command_as_one_would_type_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/a/path/trimtab", "eval", "--correction", "my folder"])
    run = describe_run("trimtab")
    assert run["command"] == "trimtab eval --correction 'my folder'"
    assert {name: run[name] for name in describe()} == describe()


def test_hardware_and_versions_are_a_line_each() -> None:
    machine = {"cpu": "C", "architecture": "A", "cores": 2, "gpu": None, "versions": {"torch": "1", "triton": "2"}}
    assert hardware(machine) == "C, A, 2 cores"
    assert hardware({**machine, "gpu": "G"}) == "C, A, 2 cores; G"
    assert versions(machine) == "torch 1 triton 2"
