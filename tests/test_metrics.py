"""The metrics: Prometheus' own parser reads them, they count what happened, and no caller can make a series."""

import threading
import time
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from scripted import ScriptedEngine, event, ids, in_memory, loopback, say, scripted_app, scripted_bank
from trimtab.errors import Overloaded
from trimtab.server import metrics
from trimtab.server.engine.engine import EngineStats
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request, Steering
from trimtab.server.metrics import Metrics
from trimtab.server.prompt import Prompter

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
CHAT_PATH = "/v1/chat/completions"
PROMPT = len(ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"))

Series = tuple[str, frozenset[tuple[str, str]]]


def read(text: str) -> dict[Series, float]:
    """All samples of ours, by name and labels without the model's."""
    found: dict[Series, float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        if family.name.startswith(("process_", "python_gc_")):
            continue
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "tiny", "vLLM's label stands on every series"
            key = sample.name.removeprefix("trimtab:"), frozenset(labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def series(name: str, **labels: str) -> Series:
    return name, frozenset(labels.items())


def test_metrics_count_what_happened() -> None:
    with in_memory(ScriptedEngine(say("abc"))) as ask:
        ask("POST", CHAT_PATH, json=CHAT | {"model": "brief", "n": 2})
        ask("POST", CHAT_PATH, json=CHAT | {"stream": True})
        ask("POST", CHAT_PATH, json=CHAT | {"model": "polite", "steering": {"mode": "shadow"}})
        answer = ask("GET", "/metrics")
        version = ask("GET", "/v1/corrections/brief").json()["version"]
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = read(answer.text)
    brief: Mapping[str, str] = {"correction": "brief", "mode": "apply"}
    expected = {
        series("num_requests_running"): 2.0,
        series("num_requests_waiting"): 1.0,
        series("kv_cache_usage_perc"): 0.375,
        series("prompt_tokens_total"): 3.0 * PROMPT,
        series("generation_tokens_total"): 16.0,
        series("prefix_cache_queries_total"): 4.0 * PROMPT,  # each choice looks, and two are of one prompt
        series("prefix_cache_hits_total"): 12.0,
        series("request_success_total", finished_reason="stop"): 4.0,
        series("time_to_first_token_seconds_count"): 4.0,
        series("inter_token_latency_seconds_count"): 12.0,
        series("e2e_request_latency_seconds_count"): 4.0,
        series("request_queue_time_seconds_count"): 4.0,
        series("request_prefill_time_seconds_count"): 4.0,
        series("request_decode_time_seconds_count"): 4.0,
        series("request_prompt_tokens_sum"): 3.0 * PROMPT,
        series("request_generation_tokens_sum"): 16.0,
        series("steering_steps_total", **brief): 8.0,
        series("steering_steps_total", correction="polite", mode="shadow"): 4.0,
        series("steering_open_total", **brief): 8.0,
        series("steering_fired_total", **brief): 8.0,
        series("steering_flips_total", **brief): 8.0,
        series("steering_kl_nats_total", **brief): 1.0,
        series("steering_fired_total", correction="polite", mode="shadow"): 4.0,
        series("steering_flips_total", correction="none", mode="off"): 4.0,
        series("steering_entropy_nats_count", correction="brief"): 8.0,
        series("steering_entropy_nats_bucket", correction="brief", le="1.25"): 0.0,
        series("steering_entropy_nats_bucket", correction="brief", le="1.5"): 8.0,
        series("correction_info", correction="brief", version=version, tier="head"): 1.0,
    }
    assert {key: samples.get(key) for key in expected} == expected
    assert not any({("correction", "polite"), ("mode", "apply")} <= labels for _, labels in samples)


@pytest.mark.parametrize("stream", [True, False])
def test_what_came_until_the_caller_left_is_counted(stream: bool) -> None:
    class Slow(ScriptedEngine):
        """A token every 5 ms, and no end."""

        def submit(self, request: Request) -> None:
            self.requests.append(request)
            threading.Thread(target=self._play, args=[request], daemon=True).start()

        def _play(self, request: Request) -> None:
            for number in range(20):
                self.on_events([event(request, 0, 65, cached=0 if number else 3)])
                time.sleep(0.005)

    engine = Slow(say("x"))
    with loopback(scripted_app(engine), engine) as url:
        body = {"prompt": "abc", "stream": stream}
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=0.5) as answer,
        ):
            answer.read()
        deadline = time.monotonic() + 10
        samples: dict[Series, float] = {}
        while not samples.get(series("request_success_total", finished_reason="abort")):
            assert time.monotonic() < deadline
            samples = read(httpx.get(f"{url}/metrics").text)
    assert samples[series("generation_tokens_total")] == 20.0
    assert samples[series("time_to_first_token_seconds_count")] == 1.0
    assert samples[series("prefix_cache_hits_total")] == 3.0
    assert samples[series("request_generation_tokens_sum")] == 20.0


def test_what_came_beside_an_error_is_counted() -> None:
    class Failing(ScriptedEngine):
        """The first choice fails in the step that gives the others a token."""

        def submit(self, request: Request) -> None:
            self.requests.append(request)
            failed = event(request, 0, None, finish="error", error="it broke")
            self.on_events([failed, event(request, 1, 65), event(request, 2, 65, finish="length")])

    with in_memory(Failing(say("x"))) as ask:
        assert ask("POST", "/v1/completions", json={"prompt": "abc", "n": 3}).status_code == 500
        samples = read(ask("GET", "/metrics").text)
    assert samples[series("generation_tokens_total")] == 2.0
    ends = dict.fromkeys(("error", "abort", "length"), 1.0)
    assert {reason: samples[series("request_success_total", finished_reason=reason)] for reason in ends} == ends


def test_what_is_scored_has_hits_and_no_length() -> None:
    def script(request: Request, index: int) -> list[Event]:
        scored = [event(request, index, 98, scored=True)] if request.score_from is not None else []
        return [*scored, event(request, index, None, finish="length", cached=3)]

    with in_memory(ScriptedEngine(script)) as ask:
        ask("POST", "/v1/completions", json={"prompt": "abcd", "echo": True, "max_tokens": 0})
        ask("POST", "/v1/steering/score", json={"prompt": "abcd", "completion": "b"})
        samples = read(ask("GET", "/metrics").text)
    assert samples[series("prefix_cache_queries_total")] == 9.0
    assert samples[series("prefix_cache_hits_total")] == 6.0
    assert samples[series("request_success_total", finished_reason="length")] == 2.0
    assert samples[series("e2e_request_latency_seconds_count")] == 2.0
    assert samples[series("request_generation_tokens_count")] == 0.0


def test_the_time_in_the_queue_is_told_apart() -> None:
    def script(request: Request, index: int) -> list[Event]:
        return [event(request, index, 65, finish="length", queued=30.0)]

    with in_memory(ScriptedEngine(script)) as ask:
        ask("POST", CHAT_PATH, json=CHAT)
        samples = read(ask("GET", "/metrics").text)
    assert 30.0 < samples[series("request_queue_time_seconds_sum")] < 60.0
    assert samples[series("request_prefill_time_seconds_sum")] == 0.0, "never below"


def test_times_begin_when_the_request_arrives_and_who_waits_for_the_tokeniser_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode = Prompter._encode

    def slowly(self: Prompter, *what: Any) -> Any:
        time.sleep(0.2)
        return encode(self, *what)

    monkeypatch.setattr(Prompter, "_encode", slowly)
    with in_memory(ScriptedEngine(say("a"))) as ask:
        ask("POST", CHAT_PATH, json=CHAT)
        samples = read(ask("GET", "/metrics").text)
    for name in ("time_to_first_token", "request_queue_time", "e2e_request_latency"):
        assert samples[series(f"{name}_seconds_sum")] >= 0.2
    assert samples[series("request_prefill_time_seconds_sum")] < 0.2
    assert samples[series("num_prompts_waiting")] == 0.0
    told = Metrics("tiny").render(EngineStats(0, 0, 0, 1, True, 0.0), unread=3).decode()
    assert read(told)[series("num_prompts_waiting")] == 3.0


def test_every_request_is_counted_by_its_routes_template_and_its_status() -> None:
    refused = ScriptedEngine(say("a"), refusal=Overloaded("the queue is full"))
    with in_memory(refused, api_keys=["k"]) as ask:
        with_key = {"Authorization": "Bearer k"}
        told = [
            ask("POST", CHAT_PATH, json=CHAT).status_code,
            ask("POST", CHAT_PATH, json=CHAT, headers=with_key).status_code,
            ask("POST", "/v1/steering/score", json={"prompt": "a", "completion": "b"}, headers=with_key).status_code,
            ask("GET", "/v1/models/nobodys", headers=with_key).status_code,
            ask("GET", "/v1/nobodys/path", headers=with_key).status_code,
            ask("BREW", CHAT_PATH, headers=with_key).status_code,
        ]
        text = ask("GET", "/metrics").text
    samples = read(text)
    models = "/v1/models/{name:path}"
    asked = [
        (CHAT_PATH, "POST"),
        (CHAT_PATH, "POST"),
        ("/v1/steering/score", "POST"),
        (models, "GET"),
        (metrics.OTHERS, "GET"),
        (CHAT_PATH, metrics.OTHERS),
    ]
    assert told == [401, 503, 503, 404, 404, 405]
    for (path, method), status in zip(asked, told, strict=True):
        assert samples[series("http_requests_total", path=path, method=method, status=str(status))] == 1.0
    assert samples[series("request_success_total", finished_reason="refused")] == 2.0
    assert samples[series("e2e_request_latency_seconds_count")] == 0.0, "what was not done has no time"
    assert "nobodys" not in text
    assert "\nprocess_resident_memory_bytes " in text
    assert "\npython_gc_collections_total" in text


def test_callers_make_no_series_and_operators_not_too_many() -> None:
    with in_memory(ScriptedEngine(say("a"))) as ask:
        for model in ("nobody", "brief"):
            ask("POST", CHAT_PATH, json=CHAT | {"model": model})
        assert "nobody" not in ask("GET", "/metrics").text
    counted = Metrics("tiny")
    names = [f"c{i}" for i in range(metrics.MAX_CORRECTIONS + 5)]
    for name in [*names, "c0"]:
        counted._label(name)
    labels = {counted._label(name) for name in names}
    assert len(labels) == metrics.MAX_CORRECTIONS + 1
    assert metrics.OTHERS in labels
    assert counted._label(None) == metrics.NO_CORRECTION
    assert counted.watch(Steering(names[-1])) is not None


def test_a_correction_that_is_gone_leaves_its_place_and_its_series() -> None:
    counted, bank = Metrics("tiny"), scripted_bank()
    idle = EngineStats(0, 0, 0, 1, True, 0.0)
    for name in ("brief", "polite"):
        counted.watch(Steering(name))
        counted.watch(Steering(name, mode="shadow"))
    for i in range(metrics.MAX_CORRECTIONS):
        counted.watch(Steering(f"c{i}"))
    assert counted._label("newest") == metrics.OTHERS
    bank.remove("polite")
    told = counted.render(idle, bank.entries).decode()
    assert series("steering_fired_total", correction="brief", mode="shadow") in read(told)
    assert "polite" not in told
    assert "c1" not in told
    assert counted._label("newest") == "newest"
