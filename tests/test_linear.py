"""A model gives a plain copy for adapters: weight for weight, without a second set of weights, and stays as it is."""

import pytest
import torch

from tiny import read_states, tiny_base, tiny_model
from trimtab.server.model.linear import PackedLinear, copy_unpacked


def test_the_copy_is_the_model_as_it_was_loaded() -> None:
    base, loaded = tiny_base(dtype=torch.bfloat16), tiny_model(dtype=torch.bfloat16)
    if not any(isinstance(module, PackedLinear) for module in base.model.modules()):
        pytest.skip("this CPU packs no bfloat16 layer")
    copy = copy_unpacked(base.model)
    assert not any(isinstance(module, PackedLinear) for module in copy.modules())
    expected = loaded.state_dict()
    found = copy.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_frozen_weights_are_shared_but_for_another_dtype() -> None:
    base = tiny_base(dtype=torch.float16)
    assert {id(p) for p in copy_unpacked(base.model).parameters()} == {id(p) for p in base.model.parameters()}
    before = read_states(base, [1, 2, 3])
    other = copy_unpacked(base.model, torch.float32)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    for parameter in other.parameters():
        parameter.data.zero_()
    assert torch.equal(read_states(base, [1, 2, 3]), before)
    assert base.model.dtype == torch.float16


def test_tied_heads_stay_tied() -> None:
    base = tiny_base(dtype=torch.bfloat16, tie_word_embeddings=True)
    copy = copy_unpacked(base.model)
    assert copy.get_output_embeddings().weight is copy.get_input_embeddings().weight
