"""What is said while a model is made ready, with a log and without one."""

import logging

import pytest

from trimtab.server.model.notices import tell


def test_it_is_logged_where_a_log_is_set_up_and_else_on_stderr(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "trimtab")
    monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])  # another test's may be left there
    tell("it takes a while: 5%")
    assert caplog.messages == ["it takes a while: 5%"]
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    tell("it takes a while")
    assert capsys.readouterr().err == "it takes a while\n"
