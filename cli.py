"""The command line: `trimtab serve | chat | fit | distill | calibrate | eval | analyze | inspect`.

Invariant: building the parser imports nothing heavy, so `--help` is instant and needs the base install alone; a mistake
of the caller's ends in one line on stderr and exit code 1.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from trimtab.arguments import explain
from trimtab.clients.chat import add_chat
from trimtab.server.serve import add_serve
from trimtab.steering.commands.evidence import add_eval
from trimtab.steering.commands.fitting import add_distill, add_fit, add_inspect
from trimtab.steering.commands.studies import add_analyze, add_calibrate


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. -> the exit code."""
    args = build_parser().parse_args(argv)
    try:
        args.func(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `trimtab inspect DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        words = explain(error)
        if words is None:
            raise
        print("trimtab:", words, file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Each command's `func` takes the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="trimtab",
        description="Serve a language model with tiny corrections, and fit them.",
        epilog="To begin: trimtab serve demo, and in a second terminal trimtab chat --compare.",
    )
    parser.add_argument("--version", action="version", version=f"trimtab {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_serve, add_chat, add_fit, add_distill, add_calibrate, add_eval, add_analyze, add_inspect):
        add(commands)
    return parser


def _version() -> str:
    from trimtab import __version__

    return __version__


if __name__ == "__main__":
    sys.exit(main())
