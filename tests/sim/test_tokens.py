import json
import math

from hypothesis import given
from hypothesis import strategies as st

from hpc_router.sim.json_schema import example
from hpc_router.sim.tokens import Completion, complete_literal, complete_text, count_tokens, unit_vector


def say(
    prompt: str = "hello",
    *,
    limit: int = 1000,
    ignore_eos: bool = False,
    stop: tuple[str, ...] = (),
    seed: str = "0",
) -> Completion:
    return complete_text(prompt, model="math", seed=seed, limit=limit, mean_tokens=16, ignore_eos=ignore_eos, stop=stop)


def test_an_answer_names_its_model_and_ends_by_itself() -> None:
    answer = say()
    assert answer.text.startswith("math simulated answer ")
    assert 8 <= answer.tokens <= 24
    assert answer.finish_reason == "stop"


@given(prompt=st.text(), mean=st.integers(1, 40))
def test_the_natural_length_is_near_its_mean_and_a_limit_there_changes_nothing(prompt: str, mean: int) -> None:
    def answer(limit: int) -> Completion:
        return complete_text(prompt, model="math", seed="0", limit=limit, mean_tokens=mean)

    natural = answer(1000)
    assert mean - mean // 2 <= natural.tokens <= mean + mean // 2
    assert answer(natural.tokens) == natural
    if natural.tokens > 1:
        assert answer(natural.tokens - 1).finish_reason == "length"


def test_the_same_prompt_and_seed_give_the_same_answer_and_others_another() -> None:
    assert say() == say()
    assert say() != say("goodbye")
    assert say() != say(seed="1")


@given(prompt=st.text(), limit=st.integers(1, 200))
def test_usage_can_be_recounted_from_the_text(prompt: str, limit: int) -> None:
    answer = say(prompt, limit=limit, ignore_eos=True)
    assert count_tokens(answer.text) == answer.tokens == limit
    assert answer.finish_reason == "length"


def test_a_model_name_with_spaces_is_still_one_token() -> None:
    answer = complete_text("x", model="my own model", seed="0", limit=2, mean_tokens=16)
    assert answer.text == "my-own-model simulated"


def test_a_stop_string_is_cut_off_with_what_follows_and_its_tokens_are_counted() -> None:
    answer = say(stop=("ulated answer",))
    assert answer.text == "math sim"
    assert (answer.tokens, answer.finish_reason, answer.stop_reason) == (3, "stop", "ulated answer")


def test_of_several_stop_strings_the_one_completed_first_counts() -> None:
    assert say(stop=("answer", "simulated", "nowhere")).stop_reason == "simulated"


def test_a_stop_string_at_the_very_beginning_leaves_nothing() -> None:
    answer = say(stop=("m",))
    assert (answer.text, answer.pieces, answer.tokens) == ("", (), 1)


@given(stop=st.text(alphabet="mathsiuled nwr", min_size=1, max_size=6))
def test_no_answer_contains_its_stop_string(stop: str) -> None:
    answer = say(stop=(stop,))
    assert stop not in answer.text
    assert say().text.startswith(answer.text)


def test_a_forced_tool_call_fills_the_schema() -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"enum": ["c", "f"]},
            "exact": {"type": "boolean"},
            "tags": {"type": "array"},
            "nothing": {"type": "null"},
            "more": {"type": "object"},
            "odd": 7,
        },
    }
    call = complete_literal(json.dumps(example(schema)), limit=100, finish_reason="tool_calls")
    assert call.text == (
        '{"city": "simulated", "days": 0, "unit": "c", "exact": true, "tags": [], "nothing": null, "more": {}, '
        '"odd": "simulated"}'
    )
    assert call.finish_reason == "tool_calls"
    assert complete_literal(call.text, limit=2, finish_reason="tool_calls").finish_reason == "length"
    assert complete_literal("{}", limit=1, finish_reason="stop").text == "{}"


@given(text=st.text(), dimensions=st.integers(1, 300))
def test_vectors_have_length_one_and_depend_on_the_text_alone(text: str, dimensions: int) -> None:
    vector = unit_vector(text, model="math", seed=0, dimensions=dimensions)
    assert math.isclose(math.hypot(*vector), 1.0, rel_tol=1e-5)
    assert vector == unit_vector(text, model="math", seed=0, dimensions=dimensions)


def test_a_lone_surrogate_in_a_prompt_is_no_problem() -> None:
    assert say("\ud800", limit=9, ignore_eos=True).tokens == 9
