"""A fleet under Ray Serve: replicas of this server, on as many machines and GPUs as its config file says.

Invariant: `user_config` alone says which corrections are served, and in which version. Ray hands it to a new replica
before that takes requests, and to every running one when it changes. A replica then changes between two of its steps:
no request is dropped, and each answer names the version that made it. What cannot be read, or is another version than
the config says, stops a new replica, and leaves a running one as it is.

    serve run deploy/fleet.yaml          # on this machine, in the foreground
    serve deploy deploy/fleet.yaml       # on a cluster; after an edit of user_config, the same again
"""

import logging
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from trimtab.errors import InvalidRequest
from trimtab.server import logs
from trimtab.server.apart import Apart
from trimtab.server.app import create_app
from trimtab.server.card import describe, describe_keys
from trimtab.server.defaults import sampling_defaults
from trimtab.server.engine.engine import Engine
from trimtab.server.keys import API_VARIABLE, choose_keys
from trimtab.server.model.base import load_base
from trimtab.server.model.weights import DEMO
from trimtab.server.serve import check_names, choose_tracer, engine_config
from trimtab.server.sources import read_named
from trimtab.server.traces import Tracer
from trimtab.steering.bank import Bank
from trimtab.steering.correction import CONTRAST, Correction
from trimtab.steering.folder import version_of

log = logging.getLogger("trimtab.server")


class Replicated(BaseModel):
    """The application's `args` in the config file: what every replica is. Names and meaning are `trimtab serve`'s."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = DEMO
    served_model_name: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_queue: int = 512
    max_queue_tokens: int = 2**20
    enforce_eager: bool = False
    threads: int = 1
    generation_config: Literal["vllm", "auto"] = "vllm"
    max_requests_per_key: int | None = Field(default=None, ge=1)  # in each replica
    allowed_origins: list[str] = []
    log_level: Literal["critical", "error", "warning", "info", "debug"] = "info"
    log_format: Literal["text", "json"] = "text"
    log_prompts: bool = False
    otlp_traces_endpoint: str | None = None


class Source(BaseModel):
    """Where a correction comes from, and which version it must be."""

    model_config = ConfigDict(extra="forbid")

    source: str  # a folder, a model hub's id, or a URL that fsspec reads: s3://bucket/folder
    version: str | None = None  # as GET /v1/corrections tells; None takes whatever is there


class Wanted(BaseModel):
    """The deployment's `user_config`: the corrections by name."""

    model_config = ConfigDict(extra="forbid")

    corrections: dict[str, Source] = {}


class Replica:
    """One whole server: a base, an engine, a bank."""

    _tracer: Tracer | None = None

    def __init__(self, args: Replicated) -> None:
        if not logging.getLogger().handlers:  # as Ray starts a replica
            logs.configure(args.log_format, args.log_level)
        self._tracer = choose_tracer(args.otlp_traces_endpoint)
        keys = choose_keys(None, API_VARIABLE, None, "api-key")
        if args.max_requests_per_key and not keys:
            raise InvalidRequest(f"max_requests_per_key needs keys: set {API_VARIABLE}", "max_requests_per_key")
        log.log(logging.INFO if keys else logging.WARNING, describe_keys(keys, ()))
        self._base = load_base(args.model, args.dtype, args.device, args.threads)
        self._bank = Bank(self._base.hidden, self._base.device)
        self._engine = Engine(self._base, self._bank, engine_config(args))
        self._names, self._slots = [args.served_model_name or self._base.name], args.max_num_seqs
        check_names(self._names)
        self._defaults = sampling_defaults(self._base) if args.generation_config == "auto" else {}
        self._app = create_app(
            self._engine,
            self._base,
            self._bank,
            names=self._names,
            api_keys=keys,
            max_per_key=args.max_requests_per_key,
            defaults=self._defaults,
            origins=args.allowed_origins,
            observers=[logs.RequestLog(args.log_prompts), *([self._tracer] if self._tracer else [])],
        )
        self._configured = False

    def __del__(self) -> None:
        """Ray calls it when a replica leaves."""
        if self._tracer is not None:
            self._tracer.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Ray calls it before the first request, and whenever the config has changed."""
        try:
            wanted = Wanted.model_validate(user_config)
            await Apart().do(lambda: self._serve(wanted))
        except Exception:
            if not self._configured:
                raise
            log.exception("the new user_config is not in place: this replica goes on with what it has")
        else:
            self._configured = True

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if not self._engine.stats().well:
            raise RuntimeError("the engine has died, or is stuck: the replica's log says why")

    def _serve(self, wanted: Wanted) -> None:
        """All sources are read, and fit the base, before anything changes."""
        swap = self._app.state.service.swap
        for name in set(wanted.corrections) & set(self._names):
            raise InvalidRequest(f"corrections.{name}: the model itself is called {name}", f"corrections.{name}")
        read = [_read(name, source) for name, source in wanted.corrections.items() if not self._has(name, source)]
        for correction in read:
            swap.check(correction)
        for correction in read:
            swap.put(correction)
        for name in self._bank.names:
            if name not in wanted.corrections and name != CONTRAST:
                swap.remove(name)
        log.info(describe(self._base, self._bank, self._names, self._slots, self._engine.max_len, self._defaults))

    def _has(self, name: str, source: Source) -> bool:
        return name in self._bank.names and self._bank.entry(name).version == source.version


def _read(name: str, source: Source) -> Correction:
    correction = read_named(source.source, name, None)
    found = version_of(correction)
    if source.version not in (None, found):
        message = f"corrections.{name}: {source.source} is version {found}, and the config wants {source.version}"
        raise InvalidRequest(message, f"corrections.{name}")
    return correction


def build(args: Replicated) -> Any:
    """The application of a config file: import_path trimtab.server.fleet:build."""
    return serve.deployment(name="trimtab")(serve.ingress()(Replica)).bind(args)
