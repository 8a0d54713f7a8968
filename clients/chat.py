"""`trimtab chat`: talk to a server in the terminal, and see where the model hesitated and what the correction did.

Invariant: a question stays in the conversation only together with its answer, or what there was of it when Ctrl-C
ended it. Ctrl-C ends an answer, never the program; a failure is a line on stderr, and the conversation goes on.

    trimtab chat                                        # a conversation
    trimtab chat --compare --once "Write a haiku."      # one question, without and with the correction
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

from trimtab.clients.client import Client
from trimtab.clients.connection import DEFAULT_URL
from trimtab.clients.facts import Model
from trimtab.clients.options import Options, Steering
from trimtab.clients.paint import LEGENDS, Marks, Painter, aside, choose_marks
from trimtab.clients.report import describe, summarise
from trimtab.errors import InvalidRequest, TrimtabError

CONTRAST = "contrast"  # the tier that every server has, as nothing is learned for it
NO_CORRECTION = "none"
HELP = """\
/correction NAME   steer with another correction; `none` for the base
/strength X        how far it steers; 0 is the base
/tau X             above which entropy it may act, in nats
/compare           answer without and with the correction, or stop doing so; the conversation goes on from the latter
/new               forget the conversation
/quit              or Ctrl-D; Ctrl-C ends an answer"""


@dataclass
class Settings:
    """What the next answer is asked with. None leaves a value to the server."""

    base: str | None
    correction: str | None
    strength: float | None = None
    tau: float | None = None
    compare: bool = False
    system: str | None = None
    options: Options = field(default_factory=Options)


class Talk:
    """One conversation."""

    def __init__(self, client: Client, settings: Settings, marks: Marks, out: TextIO) -> None:
        self.settings = settings
        self._client, self._marks, self._out = client, marks, out
        self._messages: list[dict[str, Any]] = []

    def ask(self, question: str) -> bool:
        """Print the answer, or both. -> whether it came to its end."""
        told = self.settings
        system = [] if told.system is None else [{"role": "system", "content": told.system}]
        asked = [*self._messages, {"role": "user", "content": question}]
        if told.compare and told.correction is not None:
            self._print(f"-- {told.base or 'the base'}\n")
            _, whole = self._answer([*system, *asked], Steering(report="tokens"))
            if not whole:
                return False
            self._print(f"\n-- with {told.correction}\n")
        steering = Steering(told.correction, strength=told.strength, tau=told.tau, report="tokens")
        text, whole = self._answer([*system, *asked], steering)
        if text:
            self._messages = [*asked, {"role": "assistant", "content": text}]
        return whole

    def command(self, line: str) -> bool:
        """-> whether the program goes on. Raises InvalidRequest for a command it does not know."""
        name, _, value = line.partition(" ")
        value = value.strip()
        match name:
            case "/quit":
                return False
            case "/new":
                self._messages = []
            case "/compare":
                self.settings.compare = not self.settings.compare
                self._print(f"comparing is {'on' if self.settings.compare else 'off'}\n")
            case "/correction" if value:
                # strength and tau were chosen for the other one
                correction = None if value == NO_CORRECTION else value
                self.settings = replace(self.settings, correction=correction, strength=None, tau=None)
            case "/strength":
                self.settings.strength = _number(value)
            case "/tau":
                self.settings.tau = _number(value)
            case "/help":
                self._print(f"{HELP}\n{LEGENDS[self._marks]}\n")
            case _:
                raise InvalidRequest(f"{line!r} is no command: /help lists them")
        return True

    def _answer(self, messages: Sequence[dict[str, Any]], steering: Steering) -> tuple[str, bool]:
        """Print an answer as it comes. -> its text, and whether it came to its end."""
        painter, whole = Painter(self._marks), True
        told = self.settings
        with self._client.stream_chat(messages, model=told.base, steering=steering, **told.options) as stream:
            try:
                for chunk in stream:
                    self._print(painter.paint(chunk.text, chunk.steering))
            except KeyboardInterrupt:
                whole = False
            finally:
                self._print("\n")
        if self._marks != "none" and stream.steering is not None:
            settings = f"{describe(stream.steering)}\n" if stream.steering.correction else ""
            self._print(aside(f"{settings}{summarise(stream.steering, stream.receipts)}", self._marks) + "\n")
        return stream.text, whole

    def _print(self, text: str) -> None:
        print(text, end="", file=self._out, flush=True)


def add_chat(commands: Any) -> None:
    """Add `trimtab chat` to the command line."""
    parser = commands.add_parser("chat", help="talk to a server, and see what its correction does")
    parser.set_defaults(func=run)
    parser.add_argument("--url", help=f"default: TRIMTAB_BASE_URL, or {DEFAULT_URL}")
    parser.add_argument("--api-key", help="default: TRIMTAB_API_KEY")
    parser.add_argument("--model", help="one of the server's models or corrections; default: its first")
    parser.add_argument(
        "--correction", help=f"default: the server's first besides `contrast`; `{NO_CORRECTION}` for the base alone"
    )
    parser.add_argument("--require-correction", action="store_true", help="fail where the server has none")
    parser.add_argument("--strength", type=float, help="default: the correction's own")
    parser.add_argument("--tau", type=float, help="default: the correction's own")
    parser.add_argument("--compare", action="store_true", help="answer without the correction first, then with it")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, the likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--max-tokens", type=int, default=400, help="default: 400")
    parser.add_argument("--once", metavar="QUESTION", help="one answer, and no conversation")


def run(args: argparse.Namespace) -> None:
    """Hold a conversation, or answer once."""
    marks = choose_marks(sys.stdout, os.environ, to_be_looked_at=args.compare)
    with Client(args.url, api_key=args.api_key) as client:
        base, correction = choose(client.models(), args.model, args.correction)
        if args.require_correction and correction is None:
            raise TrimtabError("this server has no correction besides `contrast`")
        options: Options = {"temperature": args.temperature, "seed": args.seed, "max_tokens": args.max_tokens}
        settings = Settings(base, correction, args.strength, args.tau, args.compare, args.system, options)
        talk = Talk(client, settings, marks, sys.stdout)
        if marks != "none" and correction is not None:
            print(aside(LEGENDS[marks], marks))
        if args.once is None:
            converse(talk, interactive=sys.stdin.isatty() and sys.stdout.isatty())
        elif not talk.ask(args.once):
            raise KeyboardInterrupt


def choose(models: Sequence[Model], model: str | None, correction: str | None) -> tuple[str | None, str | None]:
    """-> the base's name, and the correction's; a model that is a correction stands for both."""
    named = next((listed for listed in models if listed.id == model), None)
    if model is None:
        model = models[0].id if models else None
        learned = (listed.id for listed in models if listed.parent is not None and listed.tier != CONTRAST)
        correction = correction or next(learned, None)
    elif named is not None and named.parent is not None:
        model, correction = named.parent, correction or model
    return model, None if correction == NO_CORRECTION else correction


def converse(talk: Talk, interactive: bool) -> None:
    """Read questions and commands until the end of the input."""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then edits lines and remembers them
        told = talk.settings
        with_ = f" with {told.correction}" if told.correction else ""
        print(f"{told.base}{with_}; /help tells more, Ctrl-D ends.")
    while True:
        try:
            line = input("> " if interactive else "").strip()
            if line.startswith("/") and not talk.command(line):
                return
            if line and not line.startswith("/"):
                talk.ask(line)
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
        except TrimtabError as error:
            print("trimtab:", " ".join(str(error).split()), file=sys.stderr)


def _number(value: str) -> float | None:
    """None, for the correction's own, where nothing is said."""
    try:
        return float(value) if value else None
    except ValueError:
        raise InvalidRequest(f"{value!r} is not a number") from None
