"""A second round: a fit that samples from the base with a first LoRA on it, and learns what is still to be learned.

    python benchmarks/second_round.py merge MODEL runs/first/lora --out runs/once       # MODEL as the first left it
    trimtab fit --tier lora --model runs/once --task FURTHER.jsonl ... --out runs/second
    python benchmarks/second_round.py stack runs/first/lora runs/second --out runs/both     # one LoRA of MODEL itself
    trimtab eval --correction HEAD --lora runs/both --ladder ...

Invariant: on MODEL, what `stack` makes does what the second LoRA does on what `merge` made, up to the rounding of its
weights. Both refuse what they would half apply: the second LoRA must act on the layers of the first.
"""

import argparse
from pathlib import Path

import torch

from trimtab.errors import CorrectionError, TrimtabError
from trimtab.server.model.base import load_base
from trimtab.server.model.linear import copy_unpacked
from trimtab.steering.adapter import Adapter, LoraLayer, adapter_files, read_adapter
from trimtab.steering.atomic import write_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("merge", help="write the model with a LoRA in its weights, in transformers' format")
    verb.add_argument("model", help="a folder, a GGUF file or a model's id")
    verb.add_argument("lora", type=Path, help="a PEFT folder made for it")
    verb.add_argument("--dtype", default="auto", help="of what is written, as of trimtab fit's base (default: auto)")
    verb.set_defaults(run=lambda args: merge(args.model, args.lora, args.dtype, args.out))
    stacking = verbs.add_parser("stack", help="write two LoRAs as one, of their ranks' sum, as a PEFT folder")
    stacking.add_argument("first", type=Path, help="the PEFT folder that was merged")
    stacking.add_argument("second", type=Path, help="the PEFT folder that was made for the merged model")
    stacking.set_defaults(run=lambda args: write(stack(read_adapter(args.first), read_adapter(args.second)), args.out))
    for each in (verb, stacking):
        each.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    try:
        args.run(args)
    except TrimtabError as error:
        parser.error(str(error))
    print(f"{args.out} is written")


@torch.inference_mode()
def merge(model: str, lora: Path, dtype: str, out: Path) -> None:
    """W + scale * B A, in float32, then rounded to the dtype."""
    base = load_base(model, dtype, device="cpu")
    merged = copy_unpacked(base.model, torch.float32)
    modules = dict(merged.named_modules())
    for path, layer in read_adapter(lora).layers.items():
        if path not in modules:
            raise CorrectionError(f"{lora} acts on {path}, which {base.name} does not have")
        modules[path].weight += layer.scale * (layer.B.float() @ layer.A.float())
    merged.to(base.dtype).save_pretrained(out)
    base.tokenizer.save_pretrained(out)


def stack(first: Adapter, second: Adapter) -> Adapter:
    """Both updates at once: [A1; A2], [s1 B1, s2 B2], at the scale 1."""
    ranks = {(len(first.layers[path].A), len(second.layers[path].A)) for path in first.layers.keys() & second.layers}
    if first.layers.keys() != second.layers.keys() or len(ranks) != 1:
        raise CorrectionError("both LoRAs must act on the same layers, each with one rank")
    layers = {}
    for path, one in first.layers.items():
        other = second.layers[path]
        A = torch.cat([one.A.float(), other.A.float()])
        B = torch.cat([one.scale * one.B.float(), other.scale * other.B.float()], 1)
        layers[path] = LoraLayer(A, B, 1.0)
    rank = first.rank + second.rank
    plain = {"alpha_pattern": {}, "rank_pattern": {}, "use_rslora": False}
    return Adapter(layers, {**first.config, **plain, "r": rank, "lora_alpha": rank})


def write(adapter: Adapter, out: Path) -> None:
    for name, content in adapter_files(adapter).items():
        write_bytes(out / name, content)


if __name__ == "__main__":
    main()
