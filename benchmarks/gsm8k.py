"""GSM8K as a Trimtab task: chat prompts with worked examples, and the number after #### as the answer.

    python benchmarks/gsm8k.py TRAIN.jsonl --out gsm8k-train.jsonl
    python benchmarks/gsm8k.py TEST.jsonl --shots-from TRAIN.jsonl --out gsm8k-test.jsonl
    python benchmarks/gsm8k.py TEST.jsonl --shots 0 --out any.jsonl --text gsm8k.txt     # for trimtab eval --text
    trimtab fit --task gsm8k-train.jsonl --held-out gsm8k-test.jsonl --verifier final ...

The set itself (openai/grade-school-math, MIT) is read from a path: nothing is downloaded. Invariant: the examples
depend on the training file, --shots and --seed alone, so both splits show the same ones, and they are no problems
themselves. The last line is JSON: what was read and written, with digests.
"""

import argparse
import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

INSTRUCTION = 'Solve the problem step by step. End with one line "#### <number>" that holds the answer alone.'
_CALCULATION = re.compile(r"<<[^>]*>>")  # the set's own calculator marks, which no model should imitate
_MARK = "####"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="GSM8K's JSONL: question, answer ending in #### N")
    parser.add_argument("--shots-from", type=Path, help="the training file of the examples (default: the source)")
    parser.add_argument("--shots", type=int, default=3, help="worked examples before the problem (default: 3)")
    parser.add_argument("--system", default="", help="a system message before every problem")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of examples, and of the problems' order")
    parser.add_argument("--out", type=Path, required=True, help="the task file to write")
    parser.add_argument("--text", type=Path, metavar="FILE", help="write its questions and solutions as plain text too")
    args = parser.parse_args()
    lines = read(args.source)
    pool = lines if args.shots_from is None else read(args.shots_from)
    shots = random.Random(f"{args.seed}/shots").sample(pool, args.shots)
    shown = {shot["question"] for shot in shots}
    problems = [
        problem(f"{args.source.stem}-{i:05d}", line, shots, args.system) for i, line in lines_besides(lines, shown)
    ]
    random.Random(f"{args.seed}/order").shuffle(problems)  # a fit takes the first so many
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in problems)
    args.out.write_text(text, encoding="utf-8")
    facts = {
        "benchmark": "gsm8k",
        "problems": len(problems),
        "shots": args.shots,
        "system": args.system,
        "seed": args.seed,
        "source_sha256": digest(args.source),
        "shots_sha256": digest(args.shots_from or args.source),
        "task_sha256": digest(args.out),
    }
    if args.text is not None:
        asked = [line for _, line in lines_besides(lines, shown)]
        args.text.write_text("\n".join(f"{line['question']}\n{solution(line)}\n" for line in asked), encoding="utf-8")
        facts["text_sha256"] = digest(args.text)
    print(f"{args.out}: {len(problems)} problems, each after {args.shots} examples")
    print(json.dumps(facts))


def read(path: Path) -> list[dict[str, str]]:
    """All lines. Exits naming the file, the line and the fix when one is no GSM8K problem."""
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise SystemExit(f"{path}, line {number}: is not JSON ({error})") from error
        if not isinstance(line, dict) or _MARK not in line.get("answer", "") or not line.get("question"):
            raise SystemExit(f"{path}, line {number}: question and answer (ending in #### and a number) are needed")
        found.append(line)
    return found


def lines_besides(lines: list[dict[str, str]], shown: set[str]) -> list[tuple[int, dict[str, str]]]:
    """The numbered lines that are no examples; a question that occurs twice is kept once."""
    seen = set(shown)
    kept = []
    for i, line in enumerate(lines):
        if line["question"] not in seen:
            seen.add(line["question"])
            kept.append((i, line))
    return kept


def problem(identity: str, line: dict[str, str], shots: list[dict[str, str]], system: str = "") -> dict[str, Any]:
    """A line of the task file."""
    messages = [{"role": "system", "content": system}] if system else []
    for shot in shots:
        messages += [ask(shot["question"]), {"role": "assistant", "content": solution(shot)}]
    return {"id": identity, "messages": [*messages, ask(line["question"])], "answer": number(line)}


def ask(question: str) -> dict[str, str]:
    return {"role": "user", "content": f"{question.strip()}\n\n{INSTRUCTION}"}


def solution(line: dict[str, str]) -> str:
    """The set's own solution, without its calculator marks, ending as the model is asked to end."""
    steps = _CALCULATION.sub("", line["answer"]).split(_MARK)[0].strip()
    return f"{steps}\n{_MARK} {number(line)}"


def number(line: dict[str, str]) -> str:
    """The answer without thousands separators."""
    return line["answer"].split(_MARK)[1].strip().replace(",", "")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
