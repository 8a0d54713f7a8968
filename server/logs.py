"""The server's log: for people, or a JSON object a line for machines; and one line for each request, at its end.

Invariant: no text of a prompt is logged unless that was asked for, and no text of an answer ever. Every line of the
JSON format is one object with time, level, logger and message, whoever logged it. What a caller sent begins no line,
and moves no terminal: it stands in the log with escapes.

    configure("json", "info");  observers = [RequestLog(prompts=False)]
"""

import json
import logging
import re
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from pydantic import BaseModel

from trimtab.server.visit import Visit

Format = Literal["text", "json"]

log = logging.getLogger("trimtab.requests")

_QUIET = {"/health", "/ready", "/metrics"}  # which somebody asks every few seconds: told at debug level
_FACTS = "trimtab_facts"  # the attribute of a LogRecord


def configure(form: Format, level: str) -> None:
    """Let all loggers of the process write to stderr, in one format. RequestLog stands in for uvicorn's access log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # of libraries
    for name in ("trimtab", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
    logging.getLogger("uvicorn.access").disabled = True


def tell_of_all() -> None:
    """Let the process's warnings, and what nobody catches in any thread, go the same way."""
    logging.captureWarnings(True)
    sys.excepthook = _tell_end
    threading.excepthook = lambda args: _tell_end(args.exc_type, args.exc_value, args.exc_traceback)


def _tell_end(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """Of what nobody caught."""
    if error is not None and not issubclass(kind, KeyboardInterrupt | SystemExit):
        logging.getLogger("trimtab").critical("nobody caught this", exc_info=(kind, error, trace))


class RequestLog:
    """An observer: a line for each request. prompts: with what was asked."""

    def __init__(self, prompts: bool = False) -> None:
        self._prompts = prompts

    def __call__(self, visit: Visit) -> None:
        level = logging.DEBUG if visit.path in _QUIET else logging.INFO
        if log.isEnabledFor(level):
            facts = describe(visit)
            if self._prompts and visit.prompt is not None:
                facts["prompt"] = _plain(visit.prompt)
            log.log(level, "%s %s %s", visit.method, _visible(visit.path), facts["status"], extra={_FACTS: facts})


def describe(visit: Visit) -> dict[str, Any]:
    """What the line of a request holds: all that is known of it, and nothing that was said in it."""
    hidden = {"kind", "max_tokens", "temperature", "top_p"}  # for traces
    known = {key: value for key, value in visit.facts.items() if value is not None and key not in hidden}
    return {
        "request_id": visit.id,
        "method": visit.method,
        "route": visit.path,
        "status": visit.status or None,  # None: the client left before there was one
        "latency": round(visit.seconds, 6),
        **{key: round(value, 6) if isinstance(value, float) else value for key, value in known.items()},
    }


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, _FACTS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        text = json.dumps(line, ensure_ascii=False, default=str)
        return text if text.isprintable() else _UNSEEN.sub(_escape, text)


class TextFormatter(logging.Formatter):
    """`12:30:59 info message key=value ...`"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        said = {"method", "route", "status"}
        facts: dict[str, Any] = getattr(record, _FACTS, {})
        told = [f"{key}={_word(value)}" for key, value in facts.items() if key not in said]
        return " ".join([super().formatMessage(record), *told])


_UNSEEN = re.compile(r"[^\x20-\x7e]")  # perhaps: letters of all scripts are among them


def _escape(found: re.Match[str]) -> str:
    """As JSON writes it with escapes, where the character has no shape."""
    return found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1]


def _word(value: Any) -> str:
    """A value without line breaks, whatever a caller put into it."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return _visible(",".join(value))
    return str(value) if isinstance(value, int | float) else _visible(json.dumps(value, ensure_ascii=False).strip('"'))


def _visible(text: str) -> str:
    """With an escape for each character that has no shape: line breaks, and what terminals obey."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _plain(prompt: Any) -> Any:
    """A body's messages or prompt as JSON values."""
    if isinstance(prompt, list):
        return [_plain(item) for item in prompt]
    return prompt.model_dump(mode="json", exclude_unset=True) if isinstance(prompt, BaseModel) else prompt
