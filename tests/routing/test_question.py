"""What is the question of a long message, and that it decides if it is clear by itself."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_router.routing.artefact import Artefact, PartDecision, read
from hpc_router.routing.classifier import Classifier
from hpc_router.routing.policy import build_policy
from hpc_router.routing.prompt_text import Prompt, UserTurns, user_prompt
from hpc_router.routing.question import MIN_CHARS, has_parts, split_message
from tests.routing.samples import artefact, soft_artefact

RULES = (
    "# Rules of this repository\nWrite a Python function for each task. Why a loop raises an IndexError belongs in the "
    "commit message. Fix the bug in C with a test, parse JSON in the shell, sort the list of integers, print(xs[i]), "
    "and explain what a pointer is."
)
LOG = (
    "for i in range(len(xs)): print(xs[i]) raised an IndexError in my Python function; the list of integers is sorted. "
)
PATIENT = "Which treatment helps a patient with asthma and high blood pressure?"
PHRASE = "Can you say more?"


CLEAR = PartDecision(clear_margin=0.1, question_terms=3, message_terms=4)
TRAINED = Classifier(dataclasses.replace(artefact(), parts=CLEAR))


@pytest.mark.parametrize(
    ("message", "question"),
    [
        (f"{RULES}\n\n{PATIENT}", PATIENT),
        (f"{RULES}\n{PATIENT}", PATIENT),
        (f"{RULES.replace(chr(10), ' ')} {PATIENT}", PATIENT),
        (f"{LOG * 20}\n\n{PATIENT}\n", PATIENT),
        (f"{PATIENT}\n\n{LOG * 2}", PATIENT),
        (f"{PATIENT}\n\n{LOG * 2}\n\nWhat is this?", "What is this?"),
        (f"<system-reminder>\n{RULES}\n</system-reminder>\n{PATIENT}", PATIENT),
        (f"{PATIENT}\n<system-reminder>\n{RULES}\n</system-reminder>", PATIENT),
        (f"<environment_context>\n<cwd>/home</cwd>\n{RULES}\n</environment_context>\n\n{PATIENT}", PATIENT),
        (f"> {LOG}\n> {LOG}\n\n{PATIENT}", PATIENT),
        (f"{PATIENT}\n\nOn Monday she wrote:\n> {LOG}\n> {LOG}", f"{PATIENT}\n\nOn Monday she wrote:"),
        (f"{LOG * 2}说明。病人发烧应该怎么办？", "病人发烧应该怎么办？"),
        (f"{LOG * 3}\nan operator\na loop\nthe last of four options", None),
        (f"{PATIENT} {LOG}\n{LOG}", None),
        (f"{PATIENT}\n{LOG}\n{LOG}", None),
        (f"{LOG * 3}", None),
        (PATIENT, None),
        (f"Hello!\n\n{PATIENT}", None),
        ("x" * MIN_CHARS, None),
        ("?" * MIN_CHARS, None),
        ("\n" * MIN_CHARS, None),
        (f"<p>{LOG * 2}</p>", None),
    ],
    ids=repr,
)
def test_the_question_of_a_message(message: str, question: str | None) -> None:
    assert split_message(message) == (message.strip(), question)


@pytest.mark.parametrize(
    "message",
    [
        f"### Task:\n{RULES}\n\n<chat_history>\n{PATIENT}\n</chat_history>",
        f"### Task:\n{RULES}\n<context>\n{LOG * 3}\n</context>\n\n<user_query>\n{PATIENT}\n</user_query>\n",
        f"<conversation></conversation>{RULES}\n<query>{PATIENT}</query>",
    ],
)
def test_of_a_clients_template_only_the_users_words_count(message: str) -> None:
    """Chat programs ask for a title, for tags or for an answer from documents with a text of their own around the
    user's."""
    said, _ = split_message(message)
    assert said == PATIENT
    assert TRAINED.classify(message).expert == "medicine"


@pytest.mark.parametrize("rest", [RULES, LOG * 20, f"<system-reminder>{RULES}</system-reminder>", f"> {LOG}\n> {LOG}"])
def test_a_clear_question_decides_whatever_is_around_it(rest: str) -> None:
    alone = TRAINED.classify(PATIENT)
    for message in (f"{rest}\n\n{PATIENT}", f"{PATIENT}\n\n{rest}"):
        assert TRAINED._classify(message).expert == "code", "the rest alone would decide"
        assert TRAINED.classify(message) == alone
        assert TRAINED.explain(message) == TRAINED.explain(PATIENT)
        assert TRAINED.read(message)[1:] == (PATIENT, "question")


def test_a_phrase_that_says_nothing_leaves_the_decision_to_the_text() -> None:
    message = f"{LOG * 3}\n\n{PHRASE}"
    assert TRAINED.classify(message) == TRAINED._classify(message)
    assert TRAINED.classify(message).expert == "code"
    assert TRAINED.read(message).part == "all"


@pytest.mark.parametrize(
    "stored",
    [dataclasses.replace(artefact(), parts=None), soft_artefact()],
    ids=["artefact of before", "soft clusters"],
)
def test_other_artefacts_read_every_prompt_as_a_whole(stored: Artefact) -> None:
    trained = Classifier(stored)
    message = f"{RULES}\n\n{PATIENT}"
    assert trained.classify(message) == trained._classify(message)
    talk = UserTurns(f"{RULES}\n{PATIENT}", (RULES, PATIENT))
    assert trained.classify(talk) == trained._classify(talk.text)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def talk(*turns: str) -> Prompt:
    messages = [message for turn in turns for message in (user(turn), {"role": "assistant", "content": "So it is."})]
    return user_prompt({"messages": messages})


@pytest.mark.parametrize(
    ("turns", "expert", "part"),
    [
        ((LOG, PHRASE, PHRASE), "code", "message -3"),
        ((LOG, PATIENT), "medicine", "message -1"),
        ((LOG, PATIENT, PHRASE, "Thank you"), "medicine", "message -3"),
        ((LOG, f"{RULES}\n\n{PATIENT}", PHRASE), "medicine", "message -2, question"),
        ((RULES, PATIENT, "Write a Python function that sorts integers in a list."), "code", "message -1"),
        ((PHRASE, "Thank you", "It is a sum."), "math", "all"),
    ],
    ids=repr,
)
def test_a_conversation_changes_its_expert_with_a_clear_change_of_topic_only(
    turns: tuple[str, ...], expert: str, part: str
) -> None:
    policy = build_policy(kind="classifier", classifier=TRAINED, fallback=None)
    shown = policy.explain(talk(*turns), ready={}).to_dict(id=1)
    assert (shown["expert"], shown["decided_by"]) == (expert, part)
    assert policy.select(talk(*turns), ready={}).expert == shown["expert"]


TEXT = st.text(st.sampled_from("ab?.!<>/ \n。") | st.characters(), max_size=400) | st.lists(
    st.sampled_from(["<query>", "</query>", "<a>", "</a>", "\n\n", "> ", "word ", "Why? ", LOG, PATIENT]), max_size=20
).map("".join)


@settings(deadline=None)
@given(TEXT)
def test_any_message_is_split_into_parts_of_it(text: str) -> None:
    said, question = split_message(text)
    assert said in text
    if question is not None:
        assert has_parts(text)
        assert question
        assert len(question) < len(text)
    assert TRAINED.classify(text) == TRAINED.read(text).classification


def test_what_is_clear_is_part_of_the_artefact(tmp_path: Path) -> None:
    trained = artefact()
    assert trained.parts is not None
    assert trained.parts.clear_margin == pytest.approx(2 * trained.margin_threshold)
    trained.write(tmp_path / "artefact")
    assert read(tmp_path / "artefact").parts == trained.parts
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="clear_margin"):
            dataclasses.replace(trained, parts=dataclasses.replace(trained.parts, clear_margin=wrong))
