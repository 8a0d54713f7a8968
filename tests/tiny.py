"""Small random models of real families and a byte tokenizer, for tests: no weights, no network.

base = tiny_base()                 # a 2-layer Llama, vocabulary: 256 bytes + special tokens
base = tiny_base("gemma3_text")
"""

from collections.abc import Callable, Sequence
from typing import Any

import layer_reference
import pytest
import slot_attention_reference
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import AutoConfig

from trimtab.kernels.dispatch import LayerKernels
from trimtab.server.engine import runner
from trimtab.server.model import base as base_module
from trimtab.server.model import kv
from trimtab.server.model.adapters import Placed
from trimtab.server.model.attention import IMPLEMENTATION, KVBatch, Span
from trimtab.server.model.base import Base, prepare
from trimtab.steering.adapter import Adapter, LoraLayer
from trimtab.steering.correction import HeadCorrection, LoraCorrection
from trimtab.steering.gate import Gate

SPECIAL = ["<|im_end|>", "<|im_start|>"]  # ids 256 (end-of-text) and 257
REFERENCE = LayerKernels(  # the layers of a GPU, on the CPU
    slot_attention_reference.attend,
    lambda group, itemsize: 7,
    layer_reference.add_norm,
    layer_reference.silu_mul,
    layer_reference.streams,
    layer_reference.stream,
    layer_reference.stream_silu,
)
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCAB = 256 + len(SPECIAL)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "initializer_range": 0.5,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma3_text": {
        "num_hidden_layers": 4,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}


def tiny_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random causal model of the family, with Trimtab's attention."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES.get(family, {}), **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=IMPLEMENTATION)
    model.generation_config = GenerationConfig(eos_token_id=256, pad_token_id=256)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Every UTF-8 byte is one token, so any text can be written and characters are split across tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    fast.add_special_tokens({"eos_token": SPECIAL[0], "additional_special_tokens": SPECIAL[1:]})
    fast.chat_template = TEMPLATE
    return fast


def tiny_base(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Base:
    """The model and the tokenizer, checked and wrapped as the server would."""
    return prepare(tiny_model(family, seed, dtype, **overrides), tiny_tokenizer(), f"tiny-{family}")


def tiny_correction(
    base: Base, name: str = "c0", seed: int = 0, rank: int = 4, top_k: int = 10, tau: float = 1.0
) -> HeadCorrection:
    """A random correction strong enough to flip tokens."""
    generator = torch.Generator().manual_seed(seed)
    return HeadCorrection(
        name=name,
        rank=rank,
        top_k=top_k,
        base=base.identity,
        A=torch.randn(rank, base.hidden, generator=generator),
        B=torch.randn(base.hidden, rank, generator=generator) * 0.3,
        b=torch.randn(base.hidden, generator=generator) * 0.3,
        hidden_scale=1.0,
        row_scale=1.0,
        gate=Gate(tau=tau),
    )


def tiny_lora(
    base: Base, name: str = "lora", seed: int = 0, gate: Gate | None = None, size: float = 0.3
) -> LoraCorrection:
    """A random LoRA on every linear layer of the decoder, strong enough to change most tokens."""
    generator, rank = torch.Generator().manual_seed(seed), 4
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": LORA_TARGETS}
    layers = {
        path: LoraLayer(
            torch.randn(rank, layer.in_features, generator=generator) * size,
            torch.randn(layer.out_features, rank, generator=generator) * size,
            2.0,
        )
        for path, layer in base.model.named_modules()
        if path.rpartition(".")[2] in LORA_TARGETS
    }
    return LoraCorrection(name=name, base=base.identity, gate=gate or Gate(tau=1.0), adapter=Adapter(layers, config))


def read_states(base: Base, ids: Sequence[int]) -> Tensor:
    """Its h of a whole text, [tokens, hidden]: position t's predicts token t + 1."""
    return base.forward(ids, KVBatch(base.new_cache(1, len(ids)), [Span(0, 0, len(ids))]))


def place(base: Base, lora: LoraCorrection) -> Placed:
    """Its adapter, for forwards of the base's."""
    placed = base.adapted.bring(lora.adapter)
    base.adapted.attach(placed)
    return placed


def take_gpus_path(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Everything made from now on takes the GPU's path, a capture that just calls. -> one entry for every replay."""
    replayed: list[int] = []

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            replayed.append(1)
            run()

        run()
        return replay

    monkeypatch.setattr(base_module, "layers_for", lambda device: REFERENCE)
    monkeypatch.setattr(kv, "layers_for", lambda device: REFERENCE)
    monkeypatch.setattr(runner, "capture_for", lambda device: capture)
    return replayed
