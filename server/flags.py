"""The flags of `trimtab serve`. They have vLLM's names where vLLM has one.

Invariant: nothing heavy is imported, as `trimtab --help` needs them.
"""

import argparse
import json
from pathlib import Path

from trimtab.arguments import at_least
from trimtab.server.keys import ADMIN_VARIABLE, API_VARIABLE
from trimtab.server.model.weights import DEMO


def add_flags(parser: argparse.ArgumentParser) -> None:
    """MODEL, and all that says how it is served."""
    served = parser.add_argument_group("what is served").add_argument
    served("model", nargs="?", default=DEMO, metavar="MODEL", help="a folder, a .gguf file, a hub id, or `demo`")
    served(
        "--correction",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="a correction's folder or a PEFT LoRA's, and what it is called as a model; repeatable",
    )
    named = "what the model is called; the first is reported"
    served("--served-model-name", nargs="+", metavar="NAME", help=named)
    served(
        "--generation-config",
        default="vllm",
        choices=("vllm", "auto"),
        help="sampling where a request is silent: OpenAI's (vllm), or by the model's own generation_config (auto)",
    )
    served("--no-page", action="store_true", help="without the page at /")

    run = parser.add_argument_group("how it runs").add_argument
    run("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of weights and KV")
    run("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where the model runs")
    run("--threads", type=at_least(1), default=1, help="torch's threads on the CPU: no more than free cores")
    run("--enforce-eager", action="store_true", help="on CUDA, decode steps without graphs: far slower")
    length = "prompt and answer (default: the model's, at most 4096)"
    run("--max-model-len", type=at_least(2), metavar="TOKENS", help=length)
    run("--max-num-seqs", type=at_least(1), default=32, metavar="N", help="choices at once, and their second rows")
    run("--max-num-batched-tokens", type=at_least(1), default=512, metavar="TOKENS", help="tokens computed in a step")

    door = parser.add_argument_group("who may come in").add_argument
    door("--host", default="127.0.0.1", help="0.0.0.0 opens the server to the network")
    door("--port", type=at_least(0), default=8000, help="0 takes a free one")
    key = f"a key for all but /health, /ready, /metrics and the page, repeatable; also read from {API_VARIABLE}"
    door("--api-key", action="append", metavar="KEY", help=key)
    door("--api-key-file", type=Path, metavar="FILE", help="more of them, one a line")
    admin = f"a key for changing corrections at run time, repeatable; also read from {ADMIN_VARIABLE}"
    door("--admin-key", action="append", metavar="KEY", help=admin)
    door("--admin-key-file", type=Path, metavar="FILE", help="more of them, one a line")
    door("--corrections-root", type=Path, metavar="DIR", help="where folders that are loaded at run time must lie")
    door(
        "--trust-request-chat-template",
        action="store_true",
        help="let requests bring a chat template: it runs in a sandbox, but may run for long",
    )
    door(
        "--allowed-origins",
        type=_origins,
        default=[],
        metavar="JSON",
        help="a list of origins whose pages may call the server from a browser, as in '[\"http://localhost:3000\"]'",
    )

    limit = parser.add_argument_group("limits").add_argument
    limit("--max-queue", type=at_least(1), default=512, metavar="N", help="choices that may wait; more get a 503")
    tokens = "tokens of prompts that may wait to be read; more get a 503"
    limit("--max-queue-tokens", type=at_least(1), default=2**20, metavar="TOKENS", help=tokens)
    requests = "requests of one key at once; more get a 429"
    limit("--max-requests-per-key", type=at_least(1), metavar="N", help=requests)
    idle = "for which a connection is kept on which nothing comes: longer than a load balancer in front keeps it"
    limit("--timeout-keep-alive", type=at_least(1), default=75, metavar="SECONDS", help=idle)
    drain = "that running answers have after SIGTERM"
    limit("--drain-timeout", type=at_least(0), default=30, metavar="SECONDS", help=drain)

    logs = parser.add_argument_group("logs").add_argument
    levels = ("critical", "error", "warning", "info", "debug")
    logs("--log-level", default="info", choices=levels, help="from which on lines are written")
    logs("--log-format", default="text", choices=("text", "json"), help="json: an object a line")
    logs("--log-prompts", action="store_true", help="log what was asked, with each request")
    logs("--otlp-traces-endpoint", metavar="URL", help="where spans go, such as http://localhost:4318/v1/traces")


def _origins(text: str) -> list[str]:
    """A type for argparse: a JSON list of strings, as vLLM takes them."""
    try:
        origins = json.loads(text)
    except ValueError:
        origins = None
    if not isinstance(origins, list) or not all(isinstance(origin, str) for origin in origins):
        raise argparse.ArgumentTypeError(f"must be a JSON list of origins, not {text}")
    return origins
