"""`trimtab serve`: what is chosen from flags, and one real start and stop."""

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from served import serving
from tiny import tiny_base, tiny_correction, tiny_lora, tiny_model, tiny_tokenizer
from trimtab.cli import build_parser, main
from trimtab.errors import CorrectionError, InvalidRequest
from trimtab.server import serve
from trimtab.server.card import describe, describe_keys
from trimtab.server.drain import DrainingServer
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.request import Request, SamplingParams, Steering
from trimtab.server.model.kv import size_of
from trimtab.steering.adapter import adapter_files
from trimtab.steering.atomic import write_bytes
from trimtab.steering.folder import save

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def test_corrections_are_named_by_flag_or_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a=b"
    folder.mkdir()
    assert serve.choose_corrections("m", [f"mine={tmp_path}", str(folder)]) == [("mine", tmp_path), ("a=b", folder)]
    with pytest.raises(InvalidRequest, match="there is no folder"):
        serve.choose_corrections("m", [f"mine={tmp_path}/none"])


def test_the_demo_brings_its_correction_when_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "DEMO_CORRECTION", tmp_path)
    assert serve.choose_corrections("demo", []) == [(tmp_path.name, tmp_path)]
    assert serve.choose_corrections("other", []) == []
    monkeypatch.setattr(serve, "DEMO_CORRECTION", tmp_path / "none")
    assert serve.choose_corrections("demo", []) == []


@pytest.mark.parametrize(
    "flag", ["--max-num-seqs", "--max-num-batched-tokens", "--max-queue", "--threads", "--max-model-len"]
)
def test_a_size_that_is_too_small_names_the_flag_that_was_typed(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "demo", flag, "0"])
    assert f"argument {flag}: must be at least" in capsys.readouterr().err


def test_a_port_that_is_taken_is_found_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "no-such-model", "--port", str(port)]) == 1
    assert f"trimtab: port {port} of 127.0.0.1 cannot be opened (Address already in use)" in capsys.readouterr().err
    assert main(["serve", "no-such-model", "--port", "99999"]) == 1
    assert "port 99999 of 127.0.0.1 cannot be opened" in capsys.readouterr().err


def test_every_flag_of_the_engine_reaches_it() -> None:
    flags = "--max-num-seqs 3 --max-model-len 90 --max-num-batched-tokens 7 --max-queue 5 --max-queue-tokens 11"
    told = build_parser().parse_args(["serve", "demo", *flags.split(), "--threads", "2", "--enforce-eager"])
    expected = EngineConfig(3, 90, 7, max_queue=5, max_queue_tokens=11, graphs=False, threads=2)
    assert serve.engine_config(told) == expected
    assert serve.engine_config(build_parser().parse_args(["serve"])).graphs


def test_connections_outlast_those_of_load_balancers() -> None:
    assert build_parser().parse_args(["serve"]).timeout_keep_alive == 75
    assert build_parser().parse_args(["serve", "--timeout-keep-alive", "5"]).timeout_keep_alive == 5


def test_the_image_has_left_before_docker_stop_kills_it() -> None:
    """Its 10 seconds must hold the drain, the time for a reader that hangs, and the process's own end."""
    dockerfile = (Path(__file__).parent.parent / "Dockerfile").read_text(encoding="utf-8")
    (drain,) = re.findall(r'"--drain-timeout", "(\d+)"', dockerfile)
    engine: Any = None
    server = DrainingServer(uvicorn.Config("app"), engine, int(drain))
    assert server.config.timeout_graceful_shutdown is not None
    assert int(drain) < server.config.timeout_graceful_shutdown <= 9


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max-requests-per-key", "2"], "needs keys"),
        (["--corrections-root", "none"], "there is no folder none"),
        (["--api-key", ""], "must not be empty"),
        (["--served-model-name", "mine", "contrast"], "the model's name 'contrast' is the built-in correction's name"),
        (["--served-model-name", ""], "the model's name '' is empty"),
        (["--otlp-traces-endpoint", "localhost:4318"], "localhost:4318: give a URL"),
    ],
)
def test_what_an_operator_cannot_mean_is_said_before_anything_is_loaded(
    flags: list[str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(serve.API_VARIABLE, raising=False)
    monkeypatch.setattr("trimtab.server.model.base.load_base", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr("trimtab.server.logs.configure", lambda *_: None)
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    args = build_parser().parse_args(["serve", "demo", *flags])
    with pytest.raises(InvalidRequest, match=says):
        args.func(args)


def test_the_bank_takes_what_fits_and_says_what_does_not(tmp_path: Path) -> None:
    base, other = tiny_base(), tiny_base(seed=1)
    save(tiny_correction(base, "made"), tmp_path / "made")
    save(tiny_correction(other, "foreign"), tmp_path / "foreign")
    bank = serve.load_bank(base, [("one", tmp_path / "made"), ("two", tmp_path / "made")], ["tiny"])
    assert bank.names == ["one", "two"]
    told = describe(base, bank, ["tiny", "alias"], 4, 128)
    assert "tiny, alias (float32 on cpu)" in told
    assert (
        "one: head (rank 4, top_k 10, cap 3.0, activation none, parameters 288), strength 1 where entropy > 1 nats"
        in told
    )
    assert "slots        4 of 128 tokens: a KV cache of 0 MB" in told
    assert size_of(base.config, 4, 128, base.dtype) == 2 * base.new_cache(4, 128).keys.nbytes
    assert "never evaluated" in told
    assert "sampling     temperature 1, top_p 1 unless a request says otherwise" in told
    by_makers = describe(base, bank, ["tiny"], 4, 128, {"temperature": 0.6, "top_k": 20})
    assert "temperature 0.6, top_p 1, top_k 20 by the model's generation_config unless" in by_makers
    Core(base, bank)
    lines = describe(base, bank, ["tiny"], 4, 128).splitlines()
    said = 'contrast: contrast (prompt ""), strength 0.5 where entropy > 0.5 nats; two slots a choice'
    assert lines[-1] == f"correction   {said}"
    with pytest.raises(InvalidRequest, match="the model itself is called tiny"):
        serve.load_bank(base, [("tiny", tmp_path / "made")], ["tiny"])
    with pytest.raises(CorrectionError, match="fitted to"):
        serve.load_bank(base, [("x", tmp_path / "foreign")], ["tiny"])


def test_a_peft_folder_is_served_as_it_is_and_a_lora_tells_its_slots(tmp_path: Path) -> None:
    base = tiny_base()
    lora = tiny_lora(base, "mine")
    save(lora, tmp_path / "mine")
    for name, content in adapter_files(lora.adapter).items():
        write_bytes(tmp_path / "peft" / name, content)
    bank = serve.load_bank(base, [("mine", tmp_path / "mine"), ("theirs", tmp_path / "peft")], ["tiny"])
    told = describe(base, bank, ["tiny"], 4, 128)
    facts = "rank 4, layers down_proj+gate_proj+k_proj+o_proj+q_proj+up_proj+v_proj, parameters 4096"
    assert f"mine: lora ({facts}), strength 1 where entropy > 1 nats; two slots a choice" in told
    assert f"theirs: lora ({facts}), strength 1 where always; version " in told
    theirs, mine = (
        [event.token for event in Core(base, bank).run([Request("r", (1, 2), GREEDY, steering)])]
        for steering in (Steering("theirs"), Steering("mine", gate="always"))
    )
    assert theirs == mine


def test_a_server_starts_answers_and_leaves_cleanly(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    with serving(["tiny", "--max-model-len", "64", "--max-num-seqs", "2"], tmp_path) as served:
        assert "slots        2 of 64 tokens" in served.told
        assert "none for /v1: whoever reaches it may ask; none for changes" in served.told
        assert "no API key is in force" not in served.told
        assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
        assert httpx.get(f"{served.url}/v1/models").json()["data"][0]["id"] == "tiny"
        with socket.create_connection((httpx.URL(served.url).host, httpx.URL(served.url).port or 0), 10) as endless:
            endless.sendall(b"GET /health HTTP/1.1\r\nX-Long: " + b"a" * 100_000)
            assert endless.recv(100).startswith(b"HTTP/1.1 400"), "nobody's head is kept, however long it gets"


def test_a_connection_without_a_whole_request_is_left(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    flags = ["tiny", "--max-model-len", "64", "--max-num-seqs", "2", "--timeout-keep-alive", "1"]
    with serving(flags, tmp_path) as served:
        place = (httpx.URL(served.url).host, httpx.URL(served.url).port or 0)
        whole, half = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /health HTTP/1.1\r\nHo"
        for sent, answers in ((b"", 0), (half, 0), (whole, 1), (whole + half, 1)):
            with socket.create_connection(place, 30) as kept:
                kept.sendall(sent)
                told = b""
                while piece := kept.recv(1000):
                    told += piece
                assert told.count(b"HTTP/1.1 200") == answers
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 30\r\n\r\n"
        )
        for parts, answer in (((b'{"prompt": "a"', b', "max_', b'tokens":1'), b"HTTP/1.1 400"), ((), b"")):
            with socket.create_connection(place, 30) as slow:  # a body may take its time, but must come
                slow.sendall(head)
                for part in parts:
                    time.sleep(0.5)
                    slow.sendall(part)
                assert slow.recv(12) == answer


def test_why_it_does_not_start_is_a_line_of_json_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trimtab.cli", "serve", "./none", "--port", "0", "--log-format", "json"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    (line,) = map(json.loads, ran.stderr.splitlines())
    assert (line["level"], line["message"]) == ("critical", "no folder at none")


def test_a_server_that_is_open_to_the_network_says_so(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    flags = ["tiny", "--host", "0.0.0.0", "--max-model-len", "64", "--max-num-seqs", "2", "--log-format", "json"]
    with serving(flags, tmp_path) as served:
        assert "no API key is in force on --host 0.0.0.0: give --api-key, or set TRIMTAB_API_KEY" in served.told
        told = [json.loads(line) for line in served.told.splitlines()]
    assert any("slots        2 of 64 tokens" in line["message"] for line in told)
    with_keys = describe_keys(["a", "b"], ["c"])
    assert with_keys == "keys         2 for /v1; 1 for changes"


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_which_hosts_this_machine_alone_reaches(host: str, alone: bool) -> None:
    assert serve.is_loopback(host) is alone


def test_origins_are_a_json_list(capsys: pytest.CaptureFixture[str]) -> None:
    parse = build_parser().parse_args
    assert parse(["serve", "demo", "--allowed-origins", '["http://here"]']).allowed_origins == ["http://here"]
    with pytest.raises(SystemExit):
        parse(["serve", "demo", "--allowed-origins", "http://here"])
    assert "must be a JSON list of origins" in capsys.readouterr().err
