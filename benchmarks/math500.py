"""MATH-500 as a Trimtab task: a problem a chat message, the answer expected in \\boxed{}. To judge on, not to train on.

    python benchmarks/math500.py MATH500.jsonl --out math500.jsonl
    trimtab eval --correction DIR --held-out math500.jsonl --verifier math --problems 250 --max-tokens 512

The set itself (Hendrycks et al., MIT) is read from a path: nothing is downloaded. The last line is JSON, with digests.
"""

import argparse
import json
import random
from pathlib import Path

from gsm8k import digest

INSTRUCTION = "Solve the problem step by step. End with the answer in \\boxed{}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="MATH-500's JSONL: id, problem, answer, subject, level")
    parser.add_argument("--seed", type=int, default=0, help="of the problems' order")
    parser.add_argument("--out", type=Path, required=True, help="the task file to write")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.source.read_text(encoding="utf-8").split("\n") if line.strip()]
    random.Random(f"{args.seed}/order").shuffle(lines)  # a report takes the first so many
    problems = [
        {
            "id": line["id"],
            "messages": [{"role": "user", "content": f"{line['problem'].strip()}\n\n{INSTRUCTION}"}],
            "answer": line["answer"],
            "kind": f"level {line['level']}",
        }
        for line in lines
    ]
    args.out.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in problems), encoding="utf-8")
    facts = {"benchmark": "math500", "problems": len(problems), "seed": args.seed}
    facts |= {"source_sha256": digest(args.source), "task_sha256": digest(args.out)}
    print(f"{args.out}: {len(problems)} problems")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
