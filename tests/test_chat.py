"""`trimtab chat` over a mock server: what it asks, prints, remembers, and survives."""

import builtins
import io
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from mocked import RECEIPT, TOTALS, piece, refusal, sse
from trimtab.cli import main
from trimtab.clients import Client, chat

BASE = {"id": "demo"}
CONTRAST = {"id": "contrast", "parent": "demo", "tier": "contrast"}
BRIEF = {"id": "brief", "parent": "demo", "tier": "head"}
KIND = {"id": "kind", "parent": "demo", "tier": "head"}


def answer(text: str, steered: bool) -> bytes:
    """Two receipts, the second a flip where a correction acts; the totals at the end."""
    receipts = [
        {**RECEIPT, "token": token, "fired": fired, "flip": fired} for token, fired in ((text, False), ("!", steered))
    ]
    totals = {**TOTALS, "correction": "brief" if steered else None, "strength": 1.5}
    return sse(
        piece(text, steering={"tokens": receipts[:1]}),
        piece("!", steering={"tokens": receipts[1:]}),
        piece(finish_reason="stop", steering=totals),
        b"[DONE]",
    )


class Interrupted(httpx.SyncByteStream):
    """A stream in which the reader presses Ctrl-C."""

    closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield sse(piece("half"))
        raise KeyboardInterrupt

    def close(self) -> None:
        self.closed = True


class Screen:
    """Runs the command against a mock server; keeps the bodies that it saw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.models = [BASE, CONTRAST, BRIEF, KIND]
        self.bodies: list[Any] = []
        self.answers: list[httpx.Response] = []  # instead of the usual one
        self._monkeypatch, self._capsys = monkeypatch, capsys
        transport = httpx.MockTransport(self._serve)

        def opened(url: str | None, api_key: str | None) -> Client:
            return Client(url, api_key=api_key, max_retries=0, transport=transport)

        monkeypatch.setattr(chat, "Client", opened)
        monkeypatch.delenv("TRIMTAB_BASE_URL", raising=False)

    def _serve(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": self.models})
        body = json.loads(request.content)
        self.bodies.append(body)
        if self.answers:
            return self.answers.pop(0)
        steered = "correction" in body["steering"]
        return httpx.Response(200, content=answer("steered" if steered else "plain", steered))

    def run(self, *arguments: str, typed: tuple[str, ...] = ()) -> tuple[int, str, str]:
        """-> the exit code, stdout, stderr."""
        self._monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
        code = main(["chat", *arguments])
        return code, *self._capsys.readouterr()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Screen:
    return Screen(monkeypatch, capsys)


def test_once_into_a_pipe_prints_the_answer_and_nothing_else(screen: Screen) -> None:
    assert screen.run("--once", "Why?") == (0, "steered!\n", "")
    (body,) = screen.bodies
    assert body["steering"] == {"correction": "brief", "report": "tokens"}  # not the contrast: it was not learned
    assert body["messages"] == [{"role": "user", "content": "Why?"}]
    assert (body["model"], body["stream"], body["temperature"], body["seed"]) == ("demo", True, 0.0, 0)


def test_compare_asks_both_alike_and_tells_what_was_changed(screen: Screen) -> None:
    code, out, _ = screen.run(
        "--compare", "--once", "Why?", "--strength", "1.5", "--tau", "0.5", "--system", "Be kind."
    )
    assert code == 0
    assert out == (
        "[so]: the correction acted; [[so]]: and changed the best token\n"
        "-- demo\nplain!\n2 steps; mean entropy 0.75 nats\n\n"
        "-- with brief\nsteered[[!]]\nbrief at strength 1.5, where the entropy is above 0.5 nats\n"
        "2 steps: open 1, fired 1, flips 1; mean entropy 0.75 nats; KL where it fired 0.500 nats\n"
        "  step 2: ' sea' -> ' sky'\n"
    )
    base, steered = screen.bodies
    assert base.pop("steering") == {"report": "tokens"}
    assert steered.pop("steering") == {"correction": "brief", "strength": 1.5, "tau": 0.5, "report": "tokens"}
    assert base == steered  # the answers differ by the correction alone
    assert base["messages"][0] == {"role": "system", "content": "Be kind."}


def test_that_no_server_is_there_is_one_line() -> None:
    """Called as `scripts/demo` does, with a question that begins like an option."""
    command = [sys.executable, "-m", "trimtab.cli", "chat", "--compare", "--url", "http://127.0.0.1:1"]
    ran = subprocess.run(
        [*command, "--require-correction", "--once=-- why?"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch("trimtab: cannot talk to http://127.0.0.1:1/v1 .*\n", ran.stderr)


@pytest.mark.parametrize(
    ("arguments", "model", "correction"),
    [
        ([], "demo", "brief"),
        (["--correction", "kind"], "demo", "kind"),
        (["--correction", "none"], "demo", None),
        (["--model", "kind"], "demo", "kind"),
        (["--model", "kind", "--correction", "none"], "demo", None),
        (["--model", "demo"], "demo", None),
        (["--model", "demo", "--correction", "contrast"], "demo", "contrast"),
        (["--model", "other"], "other", None),
    ],
)
def test_a_model_or_a_correction_may_be_named(
    screen: Screen, arguments: list[str], model: str, correction: str | None
) -> None:
    assert screen.run(*arguments, "--once", "Why?")[0] == 0
    assert screen.bodies[0]["model"] == model
    assert screen.bodies[0]["steering"].get("correction") == correction


def test_a_server_without_corrections(screen: Screen) -> None:
    screen.models = [BASE, CONTRAST]
    assert screen.run("--compare", "--once", "Why?") == (0, "plain!\n2 steps; mean entropy 0.75 nats\n", "")
    code, _, err = screen.run("--require-correction", "--once", "Why?")
    assert (code, err) == (1, "trimtab: this server has no correction besides `contrast`\n")


def test_a_conversation_remembers_until_told_otherwise(screen: Screen) -> None:
    code, out, err = screen.run(typed=("One?", "", "Two?", "/new", "Three?", "/quit", "Four?"))
    assert (code, out, err) == (0, "steered!\n" * 3, "")
    said = [[message["content"] for message in body["messages"]] for body in screen.bodies]
    assert said == [["One?"], ["One?", "steered!", "Two?"], ["Three?"]]
    assert [message["role"] for message in screen.bodies[1]["messages"]] == ["user", "assistant", "user"]


def test_commands_change_the_next_answer(screen: Screen) -> None:
    lines = (
        "/strength 2",
        "/tau 0.25",
        "One?",
        "/correction kind",
        "Two?",
        "/correction none",
        "Three?",
        "/tau",
        "/help",
    )
    code, out, _ = screen.run("--strength", "1", typed=lines)
    assert code == 0
    assert [body["steering"] for body in screen.bodies] == [
        {"correction": "brief", "strength": 2.0, "tau": 0.25, "report": "tokens"},
        {"correction": "kind", "report": "tokens"},
        {"report": "tokens"},
    ]
    assert "Ctrl-D" in out


def test_comparing_goes_on_from_the_steered_answer(screen: Screen) -> None:
    screen.run(typed=("/compare", "One?", "/compare", "Two?"))
    assert [len(body["messages"]) for body in screen.bodies] == [1, 1, 3]
    assert screen.bodies[2]["messages"][1]["content"] == "steered!"


def test_what_goes_wrong_is_a_line_and_the_conversation_goes_on(screen: Screen) -> None:
    cut = httpx.Response(200, content=sse(piece("half")))
    screen.answers = [refusal(400, message="too\nlong"), cut]
    code, out, err = screen.run(typed=("One?", "Two?", "/sing", "/strength much", "Three?"))
    assert (code, out) == (0, "half\nsteered!\n")
    assert err.splitlines() == [
        "trimtab: too long",
        "trimtab: the stream ended before [DONE]: the answer is incomplete",
        "trimtab: '/sing' is no command: /help lists them",
        "trimtab: 'much' is not a number",
    ]
    assert [message["content"] for message in screen.bodies[-1]["messages"]] == ["Three?"]


def test_ctrl_c_ends_the_answer_and_keeps_what_came(screen: Screen) -> None:
    body = Interrupted()
    screen.answers = [httpx.Response(200, stream=body)]
    code, out, _ = screen.run(typed=("One?", "Two?"))
    assert (code, out) == (0, "half\nsteered!\n")
    assert body.closed
    assert [message["content"] for message in screen.bodies[1]["messages"]] == ["One?", "half", "Two?"]


def test_ctrl_c_at_the_prompt_ends_nothing(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter([KeyboardInterrupt, "One?", EOFError])

    def read(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", read)
    assert screen.run()[:2] == (0, "\nsteered!\n")


def test_ctrl_c_ends_a_script(screen: Screen) -> None:
    for arguments, asked in ((["--once", "Why?"], 1), (["--once", "Why?", "--compare"], 1)):
        screen.bodies.clear()
        screen.answers = [httpx.Response(200, stream=Interrupted())]
        assert screen.run(*arguments)[0] == 130
        assert len(screen.bodies) == asked


class Slow(BaseHTTPRequestHandler):
    """Begins an answer, and goes on only when the reader has left."""

    begun, left = threading.Event(), threading.Event()

    def do_GET(self) -> None:
        self._send(b'{"data": [{"id": "demo"}]}', "application/json")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._send(sse(piece("half")), "text/event-stream")
        self.begun.set()
        self.rfile.read(1)  # nothing, once the connection is closed
        self.left.set()

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        if kind == "application/json":
            self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_real_ctrl_c_in_a_real_process() -> None:
    Slow.begun.clear()
    Slow.left.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        # a job in the background, as this may be, is born deaf to SIGINT
        program = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from trimtab.cli import main
main(["chat", "--url", "{url}"])
"""
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("Why?\n")
            process.stdin.flush()
            assert process.stdout.read(4) == "half"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "\n"
            assert Slow.left.wait(30)
            process.stdin.write("/quit\n")
            process.stdin.close()
            assert process.wait(30) == 0
        server.shutdown()
