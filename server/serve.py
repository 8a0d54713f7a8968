"""`trimtab serve`: from flags to a running server.

Invariant: everything that can be wrong (a flag, the model, a correction made for another base) is said before the port
opens. Nothing heavy is imported until the command runs.
"""

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.arguments import HelpFormatter, Subparsers, explain, split_named
from trimtab.errors import EngineFailure, InvalidRequest
from trimtab.server.flags import add_flags
from trimtab.server.keys import ADMIN_VARIABLE, API_VARIABLE, choose_keys
from trimtab.server.model.weights import DEMO

if TYPE_CHECKING:
    from trimtab.server.engine.config import EngineConfig
    from trimtab.server.model.base import Base
    from trimtab.server.traces import Tracer
    from trimtab.steering.bank import Bank

log = logging.getLogger(__name__)

DEMO_CORRECTION = Path(__file__).resolve().parent.parent / "corrections" / "smollm2-135m-instructions"


def add_serve(commands: Subparsers) -> None:
    """Add `serve` to the command line."""
    parser = commands.add_parser(
        "serve",
        help="serve a model and its corrections over HTTP",
        usage="%(prog)s [MODEL] [--correction [NAME=]DIR] [options]",
        formatter_class=HelpFormatter,
    )
    add_flags(parser)
    parser.set_defaults(func=serve)


def serve(args: argparse.Namespace) -> None:
    """Load, say what was loaded, serve until SIGTERM or Ctrl-C; or until the engine dies, with the exit code 1."""
    # uvicorn raises it again after its shutdown: that is a success. The first process of a container has no other way
    # to hear of it, and what is imported below takes seconds.
    signal.signal(signal.SIGTERM, _leave)
    if args.log_format == "json":
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars are no JSON; tqdm reads this when it is imported: below
    from trimtab.server import logs

    logs.configure(args.log_format, args.log_level)
    logs.tell_of_all()
    try:
        _serve(args)
    except Exception as error:
        words = explain(error)
        if args.log_format != "json" or words is None:
            raise
        log.critical("%s", words)
        sys.exit(1)


def _serve(args: argparse.Namespace) -> None:
    import uvicorn

    from trimtab.server import logs
    from trimtab.server.app import create_app
    from trimtab.server.card import describe, describe_keys
    from trimtab.server.defaults import sampling_defaults
    from trimtab.server.drain import DrainingServer, Lifecycle
    from trimtab.server.engine.engine import Engine
    from trimtab.server.model.base import load_base
    from trimtab.server.protocol import PatientProtocol

    config = engine_config(args)
    api_keys = choose_keys(args.api_key, API_VARIABLE, args.api_key_file, "api-key")
    admin_keys = choose_keys(args.admin_key, ADMIN_VARIABLE, args.admin_key_file, "admin-key")
    if args.max_requests_per_key and not api_keys:
        raise InvalidRequest("--max-requests-per-key needs keys: give --api-key", "max_requests_per_key")
    if args.corrections_root is not None and not args.corrections_root.is_dir():
        raise InvalidRequest(f"--corrections-root: there is no folder {args.corrections_root}", "corrections_root")
    check_names(args.served_model_name or ())
    tracer = choose_tracer(args.otlp_traces_endpoint)
    folders = choose_corrections(args.model, args.correction)
    try_port(args.host, args.port)
    base = load_base(args.model, args.dtype, args.device, args.threads)
    names = args.served_model_name or [base.name]
    check_names(names)
    bank = load_bank(base, folders, names)
    engine = Engine(base, bank, config)
    defaults = sampling_defaults(base) if args.generation_config == "auto" else {}
    lifecycle = Lifecycle()
    app = create_app(
        engine,
        base,
        bank,
        names=names,
        api_keys=api_keys,
        admin_keys=admin_keys,
        corrections_root=args.corrections_root,
        max_per_key=args.max_requests_per_key,
        lifecycle=lifecycle,
        defaults=defaults,
        trust_templates=args.trust_request_chat_template,
        origins=args.allowed_origins,
        observers=[logs.RequestLog(args.log_prompts), *([tracer] if tracer else [])],
        with_page=not args.no_page,
    )
    card = describe(base, bank, names, config.slots, engine.max_len, defaults)
    card = f"{card}\n{describe_keys(api_keys, admin_keys)}"
    if args.log_format == "json":
        log.info("%s", card)
    else:
        print(card, flush=True)
    if not api_keys and not is_loopback(args.host):
        log.warning("no API key is in force on --host %s: give --api-key, or set %s", args.host, API_VARIABLE)
    settings = uvicorn.Config(
        app,
        args.host,
        args.port,
        http=PatientProtocol,  # h11, which bounds the head of a request: httptools would read one of any size
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=args.timeout_keep_alive,
    )
    server = DrainingServer(settings, engine, args.drain_timeout, lifecycle)
    try:
        server.run()
    except SystemExit:  # after SIGTERM: see `_leave`
        if not server.started:
            raise
    finally:
        if tracer is not None:
            tracer.close()
    if not server.started:
        raise EngineFailure("the server did not start: its log says why")
    _end(1 if server.failed else 0)


def check_names(names: Sequence[str]) -> None:
    """Raises InvalidRequest for what the model may not be called."""
    from trimtab.steering.correction import CONTRAST

    for name in names:
        if not name or name == CONTRAST:
            why = "is the built-in correction's name" if name else "is empty"
            raise InvalidRequest(f"the model's name {name!r} {why}: give --served-model-name", "served_model_name")


def try_port(host: str, port: int) -> None:
    """A port that is taken is found before the model is loaded. Raises InvalidRequest."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server's own will have
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise InvalidRequest(
                f"port {port} of {host} cannot be opened ({why}): give another --port", "port"
            ) from error


def is_loopback(host: str) -> bool:
    """Whether this machine alone reaches it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def engine_config(given: Any) -> "EngineConfig":
    """given: by the flags' names. Raises InvalidRequest."""
    from trimtab.server.engine.config import EngineConfig

    return EngineConfig(
        slots=given.max_num_seqs,
        max_model_len=given.max_model_len,
        step_tokens=given.max_num_batched_tokens,
        max_queue=given.max_queue,
        max_queue_tokens=given.max_queue_tokens,
        graphs=not given.enforce_eager,
        threads=given.threads,
    )


def choose_tracer(endpoint: str | None) -> "Tracer | None":
    """What sends spans, where that is wanted. Raises InvalidRequest for what is no URL; ModuleNotFoundError without
    the extra `otel`."""
    if endpoint is None:
        return None
    if not endpoint.startswith(("http://", "https://")):
        message = f"--otlp-traces-endpoint {endpoint}: give a URL, such as http://localhost:4318/v1/traces"
        raise InvalidRequest(message, "otlp_traces_endpoint")
    from trimtab.server.traces import Tracer, to_collector

    return Tracer(to_collector(endpoint))


def choose_corrections(model: str, given: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, folder) of each --correction. The demo brings its own when none is given and it is there."""
    if not given and model == DEMO and DEMO_CORRECTION.is_dir():
        return [(DEMO_CORRECTION.name, DEMO_CORRECTION)]
    chosen = []
    for item in given:
        name, path = split_named(item)
        if not path.is_dir():
            raise InvalidRequest(f"--correction {item}: there is no folder {path}", "correction")
        chosen.append((name or path.resolve().name, path))
    return chosen


def load_bank(base: "Base", folders: Sequence[tuple[str, Path]], names: Sequence[str]) -> "Bank":
    """Load, check and rename the corrections. names: the base's, which are taken. Raises CorrectionError."""
    import dataclasses

    from trimtab.steering.bank import Bank
    from trimtab.steering.correction import check
    from trimtab.steering.folder import load

    loaded = []
    for name, folder in folders:
        if name in names:
            raise InvalidRequest(f"--correction {name}={folder}: the model itself is called {name}", "correction")
        correction = dataclasses.replace(load(folder), name=name)
        check(correction, base.identity)
        loaded.append(correction)
    bank = Bank(base.hidden, base.device)
    bank.add(*loaded)
    return bank


def _end(code: int) -> None:
    """All is answered and told. The interpreter's own end would take seconds more, and wait for other threads."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


def _leave(signum: int, frame: object) -> None:
    sys.exit(0)
