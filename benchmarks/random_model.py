"""A base of random weights in a real shape, and random corrections on it: what speed needs, and no download.

base = make_base("1.5B", "cuda", seed=0);  bank = make_bank(base, seed=0)
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import AutoConfig

from trimtab.server.model.attention import IMPLEMENTATION
from trimtab.server.model.base import Base, prepare
from trimtab.steering.bank import Bank
from trimtab.steering.correction import BaseIdentity, HeadCorrection
from trimtab.steering.gate import Gate

SHAPES: dict[str, dict[str, Any]] = {  # of Qwen2.5
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 500, "tie_word_embeddings": True},
}  # fmt: skip
CORRECTIONS, RANK, TOP_K, STRENGTH = 256, 16, 32, 1e-6
SPREAD = 9.0


class NoTokenizer:
    """Random weights say nothing: every token is its number."""

    chat_template = eos_token_id = None
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}
    all_special_ids: ClassVar[list[int]] = []

    def get_vocab(self) -> dict[str, int]:
        return {}

    def convert_ids_to_tokens(self, token: int) -> str:
        return f" {token}"

    def convert_tokens_to_string(self, pieces: list[str]) -> str:
        return "".join(pieces)


def make_base(shape: str, device: str, seed: int) -> Base:
    """Random weights, their logits spread with a deviation of SPREAD: about a nat of entropy, as real models have."""
    config = AutoConfig.for_model(
        "qwen2", **SHAPES[shape], max_position_embeddings=32768, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=IMPLEMENTATION)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    base = prepare(model, NoTokenizer(), shape)
    with torch.no_grad():
        base.head_weight.normal_(std=config.initializer_range)
        model.get_decoder().norm.weight.fill_(SPREAD / (config.initializer_range * config.hidden_size**0.5))
    return base


def make_bank(base: Base, seed: int) -> Bank:
    """Random corrections c0, c1, .. whose gates are always open."""
    draw = torch.Generator().manual_seed(seed)
    heads = [
        HeadCorrection(
            name=f"c{i}",
            base=BaseIdentity("random", "", "", ""),
            gate=Gate(kind="always"),
            rank=RANK,
            top_k=TOP_K,
            A=torch.randn(RANK, base.hidden, generator=draw) / base.hidden**0.5,
            B=torch.randn(base.hidden, RANK, generator=draw) / RANK**0.5,
            b=torch.zeros(base.hidden),
            hidden_scale=1.0,
            row_scale=1.0,
        )
        for i in range(CORRECTIONS)
    ]
    bank = Bank(base.hidden, base.device)
    bank.add(*heads)
    return bank


def weight_bytes(base: Base) -> int:
    """What a decode step must read: every weight but the embedding, of which it reads a row a token."""
    decoder: nn.Module = base.model.get_decoder()
    read = {id(p): p.nbytes for name, p in decoder.named_parameters() if not name.startswith("embed_tokens")}
    return sum(read.values()) + base.head_weight.nbytes
