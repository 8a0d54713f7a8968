"""Any body that an OpenAPI document allows, and many that it does not: no answer is a 5xx, and ours keep our document.

Two documents: our own, and OpenAI's for the paths that we have (data/openai-openapi.json). TRIMTAB_FUZZ sets how many
requests are made from each; what is tried is the same in every run.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from scripted import loopback
from tiny import tiny_base, tiny_correction
from trimtab.server.app import create_app
from trimtab.server.corrections import changes
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.engine import Engine
from trimtab.steering.bank import Bank

CASES = int(os.environ.get("TRIMTAB_FUZZ", "100"))
OPENAIS = Path(__file__).parent / "data" / "openai-openapi.json"
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

load_all_checks()


class Served:
    """A server whose answers are short, and what it answered."""

    def __init__(self, url: str, document: dict[str, Any]) -> None:
        self.url, self.document, self.session = url, document, requests.Session()
        self.statuses: Counter[int] = Counter()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    base = tiny_base()
    bank = Bank(base.hidden, base.device)
    bank.add(tiny_correction(base, "bold"))
    engine = Engine(base, bank, EngineConfig(slots=8, max_model_len=96))
    app = create_app(engine, base, bank, defaults={"max_tokens": 4})
    with loopback(app, engine) as url:
        served = Served(url, app.openapi())
        yield served
        served.session.close()


def fuzz(served: Served, document: dict[str, Any], url: str, checks: list[Any]) -> None:
    """CASES requests, shared among the operations that take a body; the others get a few."""
    schema = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations()]
    writing = [found for found in operations if found.method == "post" and not changes("POST", found.path)]
    for operation in operations:
        tries = max(5, CASES // len(writing)) if operation in writing else 5
        modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
        strategies = [operation.as_strategy(generation_mode=mode) for mode in modes]

        @settings(
            max_examples=tries,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=st.one_of(strategies))
        def run(case: Any) -> None:
            response = case.call(base_url=url, session=served.session)
            served.statuses[response.status_code] += 1
            case.validate_response(response, checks=checks)
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        run()
    assert requests.get(f"{served.url}/health", timeout=60).status_code == 200


def test_our_own_document(served: Served) -> None:
    served.statuses.clear()
    fuzz(served, served.document, served.url, CHECKS)
    assert set(served.statuses) <= {200, 400, 403, 404}, "403: there is no admin key"
    assert served.statuses[200] > CASES // 20, f"hardly anything was answered: {served.statuses}"


def test_openais_document(served: Served) -> None:
    served.statuses.clear()
    document = json.loads(OPENAIS.read_text(encoding="utf-8"))
    fuzz(served, document, f"{served.url}/v1", [not_a_server_error])
    assert set(served.statuses) <= {200, 400, 404}


def test_every_route_is_described(served: Served) -> None:
    for path, methods in served.document["paths"].items():
        for method, operation in methods.items():
            assert operation.get("description"), f"{method} {path}"
            assert {"200", "4XX", "5XX"} <= set(operation["responses"]), f"{method} {path}"
