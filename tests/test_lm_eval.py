"""EleutherAI's lm-eval, its own code, against a served model: `pip install lm_eval[api]` where it is to run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scripted import loopback
from tiny import tiny_base, tiny_model
from trimtab.server.app import create_app
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.engine import Engine
from trimtab.steering.bank import Bank

completions = pytest.importorskip("lm_eval.models.openai_completions")
pytestmark = pytest.mark.filterwarnings("default")  # theirs are no errors of ours


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    base = tiny_base()
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    base.tokenizer.save_pretrained(folder)
    bank = Bank(base.hidden, "cpu")
    engine = Engine(base, bank, EngineConfig(slots=4, step_tokens=64))
    with loopback(create_app(engine, base, bank), engine) as url:
        yield completions.LocalCompletionsAPI(
            base_url=f"{url}/v1/completions",
            model=base.name,
            tokenizer_backend="huggingface",
            tokenizer=str(folder),
            batch_size=3,
            max_length=400,
        )


def test_its_loglikelihoods_are_those_of_transformers(lm: Any) -> None:
    from lm_eval.api.instance import Instance

    pairs = [
        ("The capital of France is", " Paris"),
        ("A", "b"),
        ("Grüße aus", " 🦊"),
        ("1, 2,", " 3, 4"),
        ("a b", " c"),
    ]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = lm.loglikelihood(asked)
    plain = tiny_model()
    plain.set_attn_implementation("eager")
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        before, after = (lm.tokenizer.encode(text) for text in (context, continuation))
        with torch.no_grad():
            logits = plain.eval()(torch.tensor([before + after])).logits[0]
        predicted = logits[len(before) - 1 : -1].log_softmax(-1)
        assert logprob == pytest.approx(float(predicted.gather(1, torch.tensor(after)[:, None]).sum()), abs=1e-3)
        assert greedy == (predicted.argmax(-1).tolist() == after)


def test_its_rolling_likelihood_and_its_answers_work(lm: Any) -> None:
    from lm_eval.api.instance import Instance

    text = "A little force there turns the whole ship."
    (rolling,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert -1000 < rolling < 0
    (answer,) = lm.generate_until([Instance("generate_until", {}, ("ab", {"until": ["zzz"], "max_gen_toks": 5}), 0)])
    assert isinstance(answer, str)
