"""Loading: where weights come from, and that what is not served right is not served."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tiny import VOCAB, read_states, tiny_base, tiny_model, tiny_tokenizer
from trimtab.errors import InvalidRequest, UnsupportedModel
from trimtab.server.model import attention, weights
from trimtab.server.model.attention import KVBatch, Span
from trimtab.server.model.base import Base, load_base, prepare
from trimtab.server.model.linear import PackedLinear, pack_linears

SHARED = [(7,), (7, 8), (9, 8, 7), tuple(range(20))]  # prompts: the longest is beyond a window of 8


def test_a_local_folder_loads_and_identifies_itself_alike_at_any_dtype(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    full = load_base(str(tmp_path / "tiny"), dtype="float32", device="cpu")
    half = load_base(str(tmp_path / "tiny"), dtype="bfloat16", device="cpu")
    assert full.name == "tiny"
    assert full.identity == half.identity
    assert full.identity.fingerprint != tiny_base(seed=1).identity.fingerprint
    assert full.eos == {256}


def test_an_end_token_beyond_the_head_is_none() -> None:
    assert tiny_base(eos_token_id=[3, VOCAB, 10**6]).eos == {3, 256}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere/at/all", "no folder at"),
        ("./missing.gguf", "no GGUF file at"),
    ],
)
def test_a_model_that_is_not_there_is_named(model: str, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        load_base(model)


def test_a_machine_without_a_compiler_is_told_so_and_no_model_is_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import driver

    def lacking() -> None:
        raise RuntimeError("Failed to find C compiler")

    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(driver, "_active", mock.Mock(get_current_device=lacking))
    with pytest.raises(UnsupportedModel, match=r"Failed to find C compiler.*install gcc") as told:
        load_base(str(tmp_path / "tiny"))
    assert "tiny" not in str(told.value)


def test_a_gpu_that_the_kernels_are_not_written_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver

    tiny_model().save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(driver, "_active", mock.Mock())
    with pytest.raises(UnsupportedModel, match=r"capability 7\.5.*8\.0 and later.*--device cpu"):
        load_base(str(tmp_path / "tiny"))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"has no config\.json"):
        load_base(str(tmp_path))


def test_a_family_without_attention_back_ends_is_refused() -> None:
    model = tiny_model()
    model._supports_attention_backend = False
    with pytest.raises(UnsupportedModel, match="attention back ends"):
        prepare(model, tiny_tokenizer(), "odd")


def test_a_forward_that_differs_from_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a family to need something our attention does not do, the parity check at load must see it."""
    plain = KVBatch.mask
    monkeypatch.setattr(KVBatch, "mask", lambda self, key, q, length, window: plain(self, key, q, length, 2))
    with pytest.raises(UnsupportedModel, match="differs from transformers"):
        tiny_base()


def test_soft_capped_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="soft-capping"):
        attention.attend(nn.Linear(1, 1), *[torch.zeros(1, 1, 1, 1)] * 3, None, kv_batch=object(), softcap=50.0)  # type: ignore[arg-type]


def test_decode_rows_in_neighbouring_slots_form_one_view() -> None:
    base = tiny_base()
    cache = base.new_cache(8, 32)
    batch = KVBatch(cache, [Span(1, 4, 5), Span(2, 9, 10), Span(5, 3, 4), Span(0, 0, 6)])
    assert [(run.at, run.slot, run.size, run.length) for run in batch.runs] == [(0, 1, 2, 10), (2, 5, 1, 4)]
    assert batch.chunks == [Span(0, 0, 6)]
    assert batch.last.tolist() == [0, 1, 2, 8]


def test_states_are_those_of_transformers() -> None:
    base = tiny_base("qwen3")
    sequences = [list(range(5, 25)), [7], list(range(40))]
    ours = base.drawn_from([(ids[0],) for ids in sequences], [[*ids[1:], 0] for ids in sequences])
    base.model.set_attn_implementation("sdpa")
    for ids, states in zip(sequences, ours, strict=True):
        plain = base.model.get_decoder()(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(states, plain, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def windowed() -> Base:
    return tiny_base("gemma3_text")


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(SHARED), st.lists(st.integers(0, 99), min_size=1)), min_size=1, max_size=6))
def test_a_shared_prompt_is_read_once_and_changes_no_state(
    windowed: Base, pairs: list[tuple[tuple[int, ...], list[int]]]
) -> None:
    base = windowed
    prompts, completions = [p for p, _ in pairs], [c for _, c in pairs]
    with mock.patch.object(base, "forward", wraps=base.forward) as forward:
        found = base.drawn_from(prompts, completions)
    read = [token for call in forward.call_args_list for token in call.args[0]]
    assert len(read) == sum(map(len, set(prompts))) + sum(len(c) - 1 for c in completions)
    for states, prompt, tokens in zip(found, prompts, completions, strict=True):
        whole = read_states(base, [*prompt, *tokens])[len(prompt) - 1 : -1]
        torch.testing.assert_close(states, whole, atol=1e-5, rtol=1e-4)


def test_packing_keeps_the_layers_result_and_leaves_float32_alone() -> None:
    torch.manual_seed(0)
    half = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16)).requires_grad_(False)
    x = torch.randn(5, 64).bfloat16()
    expected = half(x)
    if pack_linears(half):
        assert isinstance(half[0], PackedLinear)
        torch.testing.assert_close(half(x), expected, atol=2e-2, rtol=2e-2)
    assert pack_linears(nn.Sequential(nn.Linear(64, 32))) == 0


def test_a_packed_layer_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    half = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16)).requires_grad_(False)
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: torch.zeros(*x.shape[:-1], 32))
    assert pack_linears(half) == 0
    assert type(half[0]) is nn.Linear


def test_a_family_of_another_kind_is_refused_in_one_sentence() -> None:
    """MLA caches, chunked attention: whatever fails inside, the caller reads why this model is not served."""
    with pytest.raises(UnsupportedModel, match="tiny-deepseek_v3"):
        tiny_base("deepseek_v3", kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    with pytest.raises(UnsupportedModel, match="chunked_attention"):
        tiny_base("llama4_text", layer_types=["chunked_attention", "full_attention"], num_local_experts=2)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_folder_is_refused_in_one_sentence(file: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnsupportedModel, match="cannot be loaded"):
        load_base(str(tmp_path), device="cpu")


def test_a_damaged_gguf_file_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UnsupportedModel, match="cannot be dequantised"):
        load_base(str(tmp_path / "junk.gguf"), device="cpu")
    assert list((tmp_path / "cache" / "trimtab").iterdir()) == []


def test_what_was_made_of_a_gguf_file_lasts_as_long_as_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "_dequantise", lambda gguf, folder: (folder / "config.json").write_text("{}"))
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    one.write_text("a")
    other.write_text("b")
    first, second = weights.dequantised(one), weights.dequantised(other)
    assert weights.dequantised(one) == first
    one.write_text("changed")
    third = weights.dequantised(one)
    assert sorted((tmp_path / "cache" / "trimtab").iterdir()) == sorted([second, third])
    one.unlink()
    other.write_text("changed")
    assert sorted((tmp_path / "cache" / "trimtab").iterdir()) == sorted([second, third])
    fourth = weights.dequantised(other)
    assert list((tmp_path / "cache" / "trimtab").iterdir()) == [fourth]


def test_rope_that_depends_on_the_longest_neighbour_is_kept_where_it_does_not() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    base = tiny_base("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    assert base.max_len == 64


def test_a_single_changed_weight_changes_the_fingerprint() -> None:
    plain, changed = tiny_model(), tiny_model()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[13, 17] += 1
    names = [prepare(model, tiny_tokenizer(), "m").identity.fingerprint for model in (plain, changed)]
    assert names[0] != names[1]


def test_a_cache_that_does_not_fit_names_the_flags() -> None:
    with pytest.raises(InvalidRequest, match=r"needs .* GB.*--max-num-seqs or --max-model-len"):
        tiny_base().new_cache(10**6, 10**9)


@pytest.mark.model
def test_the_embedded_model_is_dequantised_once_and_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base("demo", device="cpu")
    assert (base.name, base.vocab, base.hidden, base.max_len) == ("SmolLM2-135M-Instruct", 49152, 576, 8192)
    monkeypatch.setattr(weights, "_dequantise", lambda *_: pytest.fail("dequantised a second time"))
    assert weights.locate("demo").name == base.name
