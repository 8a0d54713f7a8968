"""Bodies: what they become, and which keys are refused, ignored or unknown."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from trimtab.errors import InvalidRequest
from trimtab.server.engine.request import SamplingParams
from trimtab.server.responses.body import ResponseBody
from trimtab.server.schema import Body, ChatBody, CompletionBody
from trimtab.server.score import ScoreBody
from trimtab.server.stream import TextRules

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**body: Any) -> ChatBody:
    return ChatBody.model_validate({"messages": MESSAGES} | body)


def test_an_empty_chat_has_openais_defaults() -> None:
    assert chat().sampling() == SamplingParams()
    assert chat().rules() == TextRules()
    assert (chat().choices, chat().report) == (1, "summary")


def test_null_is_the_same_as_not_sent() -> None:
    fields = set(ChatBody.model_fields) - {"messages"}
    body = chat(**dict.fromkeys(fields))
    body.check()
    assert (body.sampling(), body.rules()) == (chat().sampling(), chat().rules())


def test_every_sampling_parameter_arrives() -> None:
    values: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": -5,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.2,
        "min_tokens": 2,
        "ignore_eos": True,
        "max_tokens": 8,
    }
    sampling = chat(**values, stop_token_ids=[4, 4], logit_bias={"9": 1.5}, logprobs=True, top_logprobs=4).sampling()
    expected = SamplingParams(**values, stop_token_ids=frozenset({4}), logit_bias={9: 1.5}, alternatives=4)
    assert sampling == expected


def test_a_seed_of_minus_one_is_any() -> None:
    """To vLLM; as a seed of its own it would give every such request the same answer."""
    assert chat(seed=-1).sampling() == chat().sampling()


def test_a_limit_beyond_any_context_is_no_fault() -> None:
    sampling = chat(max_tokens=10**30).sampling()
    assert sampling == chat(max_tokens=2**31 - 1).sampling()


@pytest.mark.parametrize(
    "body",
    [
        chat(min_tokens=6, max_tokens=5),
        chat(min_tokens=6, max_completion_tokens=5, max_tokens=9),
        CompletionBody.model_validate({"prompt": "a", "min_tokens": 17}),
        ResponseBody.model_validate({"input": "a", "min_tokens": 6, "max_output_tokens": 5}).chat(),
    ],
)
def test_more_tokens_at_least_than_at_most_are_refused(body: Body) -> None:
    with pytest.raises(InvalidRequest, match=r"min_tokens is \d+, and the answer may have \d+ tokens") as caught:
        body.sampling()
    assert caught.value.field == "min_tokens"


def test_as_many_at_least_as_at_most_are_fine() -> None:
    assert chat(min_tokens=5, max_tokens=5).sampling().min_tokens == 5
    with pytest.raises(InvalidRequest):
        chat(min_tokens=6).sampling({"max_tokens": 5})


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=6).sampling().max_tokens == 6


def test_what_is_told_of_a_limit_is_told_of_the_name_it_was_sent_by() -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        body = chat(**{name: -1})
        with pytest.raises(InvalidRequest) as caught:
            body.sampling()
        error = body.as_written(caught.value)
        assert (error.field, str(error).split()[0]) == (name, name)


BAD = 3000 * [{}]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, {"prompt": BAD}),
        (CompletionBody, {"prompt": [BAD]}),
        (CompletionBody, {"prompt": "a", "stop": BAD}),
        (CompletionBody, {"prompt": "a", "stop_token_ids": BAD}),
        (CompletionBody, {"prompt": "a", "allowed_token_ids": BAD}),
        (CompletionBody, {"prompt": "a", "guided_choice": BAD}),
        (CompletionBody, {"prompt": "a", "structured_outputs": {"choice": BAD}}),
        (CompletionBody, {"prompt": "a", "logit_bias": {f"x{i}": 1 for i in range(3000)}}),
        (CompletionBody, {"prompt": "a", "steering": {"corrections": {str(i): "x" for i in range(3000)}}}),
        (CompletionBody, {"prompt": "a", "steering": {"budget": {"spans": BAD}}}),
        (ChatBody, {"messages": BAD}),
        (ChatBody, {"messages": [{"role": "user", "content": BAD}]}),
        (ChatBody, {"messages": [{"role": "assistant", "tool_calls": BAD}]}),
        (ChatBody, {"messages": MESSAGES, "tools": BAD}),
        (ChatBody, {"messages": MESSAGES, "documents": 3000 * [1]}),
        (ScoreBody, {"prompt": BAD, "completion": BAD}),
        (ResponseBody, {"input": BAD}),
        (ResponseBody, {"input": [{"role": "user", "content": BAD}]}),
        (ResponseBody, {"input": "a", "metadata": {str(i): 1 for i in range(3000)}}),
    ],
)
def test_reading_stops_at_the_first_fault(kind: type[BaseModel], body: dict[str, Any]) -> None:
    """All of them would be found on the event loop, in seconds, for each type that they could have been."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 12


def test_rules() -> None:
    body = chat(stop=["a", "b"], min_tokens=3, include_stop_str_in_output=True, skip_special_tokens=False)
    assert body.rules() == TextRules(("a", "b"), 3, True, False)
    assert chat(stop="a").rules().stop == ("a",)
    assert chat(stop_token_ids=[5, 5]).rules().stop_tokens == {5}


@pytest.mark.parametrize(
    ("key", "fine", "refused"),
    [
        ("functions", [], [{}]),
        ("response_format", {"type": "text"}, {"type": "json_schema"}),
        ("suffix", "", "x"),
        ("use_beam_search", False, True),
        ("guided_json", {}, "{"),
        ("best_of", 1, 2),
        ("tool_choice", "auto", "required"),
        ("tool_choice", "none", {"type": "function", "function": {"name": "f"}}),
        ("truncate_prompt_tokens", -1, 0),
        ("truncate_prompt_tokens", 1, -2),
        ("prompt_embeds", None, "AAAA"),
        ("modalities", ["text"], ["text", "audio"]),
        ("logits_processors", [], ["module.f"]),
        ("echo", False, True),
        ("add_special_tokens", False, True),
        ("vllm_xargs", {}, {"correction": "brief"}),
        ("logprob_token_ids", [], [1, 2]),
        ("repetition_detection", {}, {"max_pattern_size": 4, "min_count": 3}),
        ("thinking_token_budget", -1, 0),
        ("cache_salt", "", "mine"),
        ("web_search_options", None, {}),
        ("moderation", None, {"model": "omni-moderation-latest"}),
        ("context_management", [], [{"type": "compaction"}]),
    ],
)
def test_what_would_change_the_answer_is_refused_not_ignored(key: str, fine: Any, refused: Any) -> None:
    chat(**{key: fine}).check()
    with pytest.raises(InvalidRequest) as caught:
        chat(**{key: refused}).check()
    assert caught.value.field == key


def test_what_has_another_name_here_is_told_it() -> None:
    with pytest.raises(InvalidRequest, match="vllm_xargs is not supported by this server: send steering"):
        chat(vllm_xargs={"correction": "brief"}).check()


@pytest.mark.parametrize(
    ("key", "fine", "refused"),
    [("max_completion_tokens", None, 5), ("top_logprobs", 0, 3), ("chat_template", None, "x"), ("documents", [], [{}])],
)
def test_what_only_chats_have_is_refused_in_completions(key: str, fine: Any, refused: Any) -> None:
    CompletionBody.model_validate({"prompt": "a", key: fine}).check()
    with pytest.raises(InvalidRequest) as caught:
        CompletionBody.model_validate({"prompt": "a", key: refused}).check()
    assert caught.value.field == key


def test_unknown_keys_are_told_apart() -> None:
    assert chat(frobnicate=1, user="u", tools=[]).unknown_keys() == {"frobnicate"}


def test_a_batch_of_ids_is_not_a_prompt_of_ids() -> None:
    assert CompletionBody.model_validate({"prompt": [1, 2]}).prompts == [[1, 2]]
    assert CompletionBody.model_validate({"prompt": [[1, 2]]}).prompts == [[1, 2]]
