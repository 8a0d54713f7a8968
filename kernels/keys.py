"""What the step's Triton kernels share: how a logit is read, and how (value descending, id ascending) becomes an int64.

Invariant: read from the largest, keys order the tokens of a row totally, so ties never depend on the hardware.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
import triton
import triton.language as tl

GROUP = tl.constexpr(128)  # tokens a group; also the reference's
LOWEST = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # below the key of every token, -inf included
NEG_INF = tl.constexpr(float("-inf"))
INF = tl.constexpr(float("inf"))
LOW_WORD = tl.constexpr(0xFFFFFFFF)

# Columns of which a program reads or writes one element: where they begin must not decide which kernel is compiled.
COLUMNS = [
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "noise",
    "repetition",
    "presence",
    "frequency",
    "steered",
    "gate",
    "tau",
    "ceiling",
    "chance",
    "correction",
    "weight",
    "strength",
    "correction_top_k",
    "cap",
    "silu",
    "forced",
    "kl_cap",
    "shadow",
    "edit_spans",
    "edit_token",
    "edit_count",
    "edit_bias",
    "mask_row",
    "mask_words",
    "task",
    "norms",
    "state",
    "token_out",
    "status_out",
    "base_token_out",
    "steered_token_out",
    "entropy_out",
    "base_logprob_out",
    "steered_logprob_out",
    "base_token_logprob_out",
    "steered_token_logprob_out",
    "statistic_out",
    "kl_out",
    "applied_strength_out",
    "top_ids_out",
    "top_logprobs_out",
]


@triton.jit
def load_logits(logits, token, vocab):
    """float32 logits of one live row; -inf past the vocabulary."""
    return tl.load(logits + token, mask=token < vocab, other=NEG_INF).to(tl.float32) + 0.0  # -0.0 becomes +0.0


@triton.jit
def to_key(value, token):
    """value must be neither NaN nor -0.0."""
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (LOW_WORD - token.to(tl.int64))


@triton.jit
def key_value(key):
    """The float of a key; -inf for LOWEST."""
    ordered = (key >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return tl.where(key == LOWEST, NEG_INF, bits.to(tl.float32, bitcast=True))


@triton.jit
def key_token(key):
    """The id of a key; -1 for LOWEST."""
    return tl.where(key == LOWEST, -1, LOW_WORD - (key & LOW_WORD)).to(tl.int32)


@triton.jit
def inverse_temperature(temperature):
    """1 for greedy rows, which weigh nothing; never infinite, so that 0 * it is 0."""
    return tl.where(temperature > 0.0, 1.0 / tl.maximum(temperature, 1e-20), 1.0)
