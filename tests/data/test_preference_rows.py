"""The common forms of preferences: what each is read as, and what is refused or counted."""

from collections import Counter

import pytest

from jaxft.config import DataConfig
from jaxft.data.preferences.prompts import prompt_in, shared_prompt, transcript
from jaxft.data.preferences.rows import preferences_of
from jaxft.data.rows.values import RowProblem

USER = {"role": "user", "content": "What colour is the sky?"}
BLUE, GREEN = {"role": "assistant", "content": "It is blue."}, {"role": "assistant", "content": "It is green."}
CHAT = ([USER], [BLUE], [GREEN])


def pairs_of(row, left_out=None, **data):
    return preferences_of(row, DataConfig(**data), Counter() if left_out is None else left_out)


def one(row, **data):
    (preference,) = pairs_of(row, **data)
    return preference


def parts(preference):
    return preference.prompt, preference.chosen, preference.rejected


TURNS = {"from": "gpt", "value": "It is blue."}, {"from": "gpt", "value": "It is green."}


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}, "preference"),
        ({"prompt": [USER], "chosen": "It is blue.", "rejected": "It is green."}, "preference"),
        ({"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, "preference"),
        ({"prompt": [USER], "preferred": [BLUE], "dispreferred": [GREEN]}, "preference"),
        ({"question": USER["content"], "chosen": "It is blue.", "rejected": "It is green."}, "preference"),
        (
            {"instruction": USER["content"], "input": "", "chosen": "It is blue.", "rejected": "It is green."},
            "preference",
        ),
        (
            {"conversations": [{"from": "human", "value": USER["content"]}], "chosen": TURNS[0], "rejected": TURNS[1]},
            "preference",
        ),
        ({"chosen": [USER, BLUE], "rejected": [USER, GREEN]}, "implicit_prompt"),
        ({"prompt": USER["content"], "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, "implicit_prompt"),
        (
            {
                "chosen": "\n\nHuman: What colour is the sky?\n\nAssistant: It is blue.",
                "rejected": "\n\nHuman: What colour is the sky?\n\nAssistant: It is green.",
            },
            "implicit_prompt",
        ),
        (
            {
                "prompt": "\n\nHuman: What colour is the sky?\n\nAssistant: ",
                "chosen": " It is blue.",
                "rejected": "It is green.",
            },
            "preference",
        ),
        (
            {"input": {"messages": [USER]}, "preferred_output": [BLUE], "non_preferred_output": [GREEN]},
            "openai_preference",
        ),
    ],
)
def test_every_form_of_a_chat_is_the_same_pair(row, form):
    preference = one(row)
    assert parts(preference) == CHAT and preference.form == form and preference.margin is None


def test_text_stays_text():
    row = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    assert parts(one(row)) == ("The sky is", " blue.", " green.")
    renamed = {"q": "The sky is", "good": " blue.", "bad": " green."}
    fields = {"prompt_field": "q", "chosen_field": "good", "rejected_field": "bad"}
    assert parts(one(renamed, **fields)) == ("The sky is", " blue.", " green.")


def test_a_named_column_is_text_even_if_its_name_is_known():
    row = {"question": "Q: 2+2\nA:", "chosen": " 4", "rejected": " 5"}
    assert parts(one(row, prompt_field="question")) == ("Q: 2+2\nA:", " 4", " 5")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("Q: where?\nA: here", "Q: where?\nA: there", "Q: where?\nA:"),
        ("The sky is blue.", "The sky is black.", "The sky is"),  # the word in which they part belongs to the answers
        ("It is Paris", "It is Parish", "It is"),
        ("2+2\n4", "2+2\n5", "2+2\n"),
    ],
)
def test_the_prompt_of_two_texts_is_what_they_share(chosen, rejected, prompt):
    assert shared_prompt(chosen, rejected) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])


@pytest.mark.parametrize(
    ("one", "two"), [("The sky is blue.", "The sky is green."), ("a: b c", "a: d"), ("x\ny", "x\nz")]
)
def test_texts_that_part_at_a_word_are_split_as_trl_does(one, two):
    trl = pytest.importorskip("trl")
    theirs = trl.extract_prompt({"chosen": one, "rejected": two})
    assert shared_prompt(one, two) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


def test_the_prompt_of_two_conversations_is_their_shared_messages():
    more = {"role": "user", "content": "Sure?"}
    assert shared_prompt([USER, BLUE, more, BLUE], [USER, BLUE, more, GREEN]) == ([USER, BLUE, more], [BLUE], [GREEN])
    assert shared_prompt([USER, BLUE, more, BLUE], [USER, GREEN]) == ([USER], [BLUE, more, BLUE], [GREEN])


def test_transcripts():
    text = "\n\nHuman: Hi.\n\nHow are you?\n\nAssistant: Well.\n\nHuman: Good.\n\nAssistant:"
    messages = transcript(text)
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"] == "Hi.\n\nHow are you?"
    assert transcript("Human: alone") is None and transcript("He said\n\nHuman: a\n\nAssistant: b") is None


def test_tools_and_variables_of_the_template_come_along():
    tools, variables = [{"type": "function", "function": {"name": "f"}}], {"enable_thinking": False}
    row = {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN], "tools": tools, "chat_template_kwargs": variables}
    assert one(row).extras == {"tools": tools, "chat_template_kwargs": variables}
    row = {"input": {"messages": [USER], "tools": tools, "parallel_tool_calls": True}, "preferred_output": [BLUE],
           "non_preferred_output": [GREEN]}  # fmt: skip
    assert one(row).extras == {"tools": tools}


def test_system_messages_of_the_row_come_first():
    row = {"system": "Be brief.", "question": "Why?", "chosen": "So.", "rejected": "Because of that."}
    assert [message["role"] for message in one(row).prompt] == ["system", "user"]


@pytest.mark.parametrize(
    ("columns", "margin"),
    [
        ({"margin": 2}, 2.0),
        ({"score_chosen": 8.5, "score_rejected": 7}, 1.5),
        ({"chosen_rating": 1, "rejected_rating": 4}, -3.0),
        ({"score_chosen": 1.0}, None),
        ({"margin": None}, None),
    ],
)
def test_margins(columns, margin):
    assert one({"prompt": "q", "chosen": " a", "rejected": " b", **columns}).margin == margin


ANSWERS = [("bad", 1.0), ("best", 9.0), ("middling", 4.0), ("middling too", 4.0)]


@pytest.mark.parametrize(
    ("which", "expected", "ties"),
    [
        ("best_worst", [("best", "bad")], 0),
        ("best_others", [("best", "middling"), ("best", "middling too"), ("best", "bad")], 0),
        ("adjacent", [("best", "middling"), ("middling too", "bad")], 1),
        (
            "all",
            [
                ("best", "middling"),
                ("best", "middling too"),
                ("best", "bad"),
                ("middling", "bad"),
                ("middling too", "bad"),
            ],
            1,
        ),
    ],
)
def test_pairs_of_a_list(which, expected, ties):
    left_out = Counter()
    row = {"instruction": "q", "completions": [{"response": text, "overall_score": score} for text, score in ANSWERS]}
    found = pairs_of(row, left_out, pairs=which)
    texts = [(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in found]
    assert texts == expected and left_out["ties"] == ties
    scores = dict(ANSWERS)
    assert [pair.margin for pair in found] == [scores[better] - scores[worse] for better, worse in expected]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q:", "answers": [{"answer": " a", "rank": 2.0}, {"answer": " b", "rank": 1.0}]},
        {"prompt": "q:", "answers": {"answer": [" a", " b"], "score": [0, 1]}},  # as a table stores it
        {"prompt": "q:", "generations": [" a", " b"], "ratings": [1, 3]},
        {"prompt": "q:", "responses": [" a", " b"], "ranks": [7, 2]},
        {"prompt": "q:", "drafts": [" a", " b"], "grades": [7, 8]},
    ],
)
def test_where_a_list_has_its_scores(row):
    named = {"answers_field": "drafts", "score_field": "grades"} if "drafts" in row else {}
    preference = one(row, **named)
    assert parts(preference) == ("q:", " b", " a") and preference.form == "ranked" and preference.margin > 0


def test_which_of_several_scores_ranks_is_a_setting():
    answers = [
        {"text": " a", "overall_score": 9, "fine-grained_score": 2},
        {"text": " b", "overall_score": 5, "fine-grained_score": 4},
    ]
    row = {"prompt": "q:", "completions": answers}
    with pytest.raises(RowProblem, match=r"several scores in 'completions': overall_score, fine-grained.*data.score_f"):
        pairs_of(row)
    assert one(row, score_field="overall_score").chosen == " a"
    assert one(row, score_field="fine-grained_score").chosen == " b"
    assert one({"prompt": "q:", "drafts": answers}, answers_field="drafts", score_field="overall_score").chosen == " a"


def test_nothing_to_prefer_is_counted():
    left_out = Counter()
    tied = [{"response": "a", "score": 3}, {"response": "b", "score": 3}]
    same = [{"response": "a", "score": 3}, {"response": "a", "score": 5}]
    assert pairs_of({"prompt": "q", "completions": tied}, left_out) == []
    assert pairs_of({"prompt": "q", "completions": same}, left_out) == []
    assert pairs_of({"prompt": "q", "completions": tied[:1]}, left_out) == []
    assert left_out == Counter(ties=1, same=1)


PAIR = {"chosen": " a", "rejected": " b"}


@pytest.mark.parametrize(
    ("row", "data", "message"),
    [
        (
            {"prompt": "q", "choosen": "a", "rejected": "b"},
            {},
            r"lacks 'chosen'.*mean 'choosen'\? Then set data.chosen_",
        ),
        ({"a": 1}, {}, r"it is no preference: it lacks 'chosen' and 'rejected'.*its keys: a\), or a list of ranked"),
        ({"prompt": "q", **PAIR}, {"prompt_field": "promt"}, r"lacks 'promt'.*Did you mean 'prompt'\?"),
        ({"instruction": "q", "question": "r", **PAIR}, {}, r"in 'instruction' or in 'question'. Set data.prompt_f"),
        ({"query": "q", "chosen": "The sky", "rejected": "The sea"}, {}, r"in 'query'. Set data.prompt_field='query'"),
        ({"chosen": "abc", "rejected": "xyz"}, {}, r"share no beginning, so there is no prompt. Set data.prompt_field"),
        ({"chosen": "a b", "rejected": "a b c"}, {}, r"one answer begins with the whole of the other"),
        ({"chosen": [USER, BLUE], "rejected": [BLUE]}, {}, r"share no first message.*Set data.prompt_field"),
        ({"chosen": [USER, BLUE], "rejected": [USER]}, {}, r"one answer begins with the whole of the other"),
        ({"chosen": [USER, BLUE, USER], "rejected": [USER, BLUE, GREEN]}, {}, r"part at a message of 'user'"),
        ({"chosen": [USER, BLUE], "rejected": "text"}, {}, r"one answer is text and the other is a list"),
        ({"preferred_output": [BLUE], "non_preferred_output": [GREEN]}, {}, r"not in OpenAI's form.*lacks 'input'"),
        ({"input": {}, "preferred_output": [BLUE], "non_preferred_output": [GREEN]}, {}, r"lacks input.messages"),
        ({"prompt": "q", **PAIR, "margin": "1"}, {}, r"'margin' is '1'; it must be a number"),
        ({"prompt": "q", **PAIR, "score_chosen": float("nan"), "score_rejected": 1}, {}, r"'score_chosen' is 'nan'"),
        ({"prompt": "q", **PAIR, "margin": 10**400}, {}, r"'margin' is '10000*'; it must be a number"),
        ({"prompt": "q", **PAIR, "score_chosen": 2e38, "score_rejected": -2e38}, {}, r"is 2e\+38; .*of at most 1e\+38"),
        (
            {"prompt": "q", "completions": [{"response": "a", "score": 10**400}, {"response": "b", "score": 1}]},
            {},
            r"completions.* 1: score is '10000*'; it must be a number",
        ),
        ({"completions": [{"response": "a", "score": 1}]}, {}, r"'completions', but no prompt in 'prompt'"),
        (
            {"prompt": "q", "completions": [{"response": "a", "grade": 1}]},
            {},
            r"no score in 'compl.*its keys: grade, resp",
        ),
        (
            {"prompt": "q", "completions": [{"reply": "a", "score": 1}]},
            {},
            r"'completions' have no answer: their keys are re",
        ),
        (
            {"prompt": "q", "completions": [{"response": "a", "score": 1}, {"response": "b"}]},
            {},
            r"entry 2 lacks 'score'",
        ),
        (
            {"prompt": "q", "completions": [{"response": "a", "score": "N/A"}]},
            {},
            r"completions 1: score is 'N/A'; it must be",
        ),
        (
            {"prompt": "q", "answers": ["a", "b"], "scores": [1]},
            {},
            r"'answers' has 2 answers, and 'scores' is '\[1\]'",
        ),
        (
            {"prompt": "q", "answers": ["a"], "responses": ["b"]},
            {},
            r"in 'answers' or in 'responses'. Set data.answers_f",
        ),
        ({"prompt": "q"}, {"answers_field": "drafts"}, r"lacks 'drafts', the list of answers by data.answers_field"),
        ({"prompt": "q", "answers": [{"text": "a", "score": 1}]}, {"score_field": "sore"}, r"no 'sore' in.*'score'\?"),
    ],
)
def test_refusals(row, data, message):
    with pytest.raises(RowProblem, match=message):
        pairs_of(row, **data)


def test_a_prompt_is_found_for_other_rows_too():
    """Rows of one labelled answer have their prompts in the same columns."""
    assert prompt_in({"prompt": "q"}, DataConfig()).given == "q"
    assert prompt_in({"completion": "q"}, DataConfig()).given is None
