"""Conversations token by token: what the template puts between sampled turns, and templates that rewrite them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from environment_cases import Echo

from jaxft import api
from jaxft.assets import ASSETS
from jaxft.data.prompts import Prompt
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import ConfigError, DataError
from jaxft.generation.settings import Generated
from jaxft.rollouts import sample
from jaxft.rollouts.environments.template import ANSWER, TurnTemplate

# Keeps the thoughts of the last answer only.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Marks the last answer, whatever it is.
LAST_MARKED = THINKING.replace(
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}",
    "{{ m.content }}{% elif m.role == 'assistant' %}last: {{ m.content }}{% else %}",
)
# Takes no tools, and puts spaces where ChatML has tokens.
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def make_tokenizer():
    def make(template=None):
        backend = api.load_tokenizer(str(ASSETS / "smoke")).backend
        if template is not None:
            backend.chat_template = template or None
        return Tokenizer(backend, name="tiny")

    return make


class InThisProcess:
    """`Environments` without processes."""

    def __init__(self, make):
        self._make = make

    def reset(self, rows, where):
        self.instances = [self._make() for _ in rows]
        return [tuple(one.reset(row)) for one, row in zip(self.instances, rows, strict=True)]

    def step(self, completions):
        self.steps = getattr(self, "steps", 0) + 1
        return {i: tuple(self.instances[i].step(text)) for i, text in completions.items()}

    def rewards(self, indices):
        return {i: (self.instances[i].reward(), False) for i in indices}


def prompt_of(points, tokens=(1, 2)):
    return Prompt(
        tokens=np.array(tokens, np.int32), mask=np.zeros(len(tokens), np.uint8), row=points, messages="", where="a row",
        columns={"points": points},
    )  # fmt: skip


def conversations(monkeypatch, tokenizer, turns, make=Echo, prompts=None, group=1, **settings):
    """The answers of a sampler whose model says `turns`, (text, end) by number of the turn; and the calls of it."""
    calls = []

    def generate(model, prompts, *, sampling, answers, streams, **rest):
        calls.append({"prompts": prompts, "sampling": sampling, "answers": answers, "streams": streams, **rest})
        text, end = turns[len(calls) - 1]
        done = []
        for one in sampling:
            ids = [*tokenizer.encode(text), *([] if end is None else [end])][: one.max_new_tokens]
            reason = "stop" if ids[-1] in tokenizer.stop_ids else "length"
            done.append(Generated(tokens=tuple(ids), logprobs=(-1.0,) * len(ids), finish_reason=reason))
        return done

    monkeypatch.setattr(sample, "generate_tokens", generate)
    monkeypatch.setattr(sample, "for_decoding", lambda model: model)
    sampler = sample.Sampler(
        tokenizer=tokenizer, environments=InThisProcess(make), group=group, slots=8,
        **({"max_completion_length": 200, "length": 256, "max_turns": 8} | settings),
    )  # fmt: skip
    model = SimpleNamespace(virtual_tokens=0)
    return sampler.sample(model, prompts or [prompt_of(1)], temperature=1.0, seed=3), calls


@pytest.mark.parametrize(("template", "role"), [(None, "tool"), (BRACKETS, "user")])
def test_the_tokens_of_a_conversation_are_those_of_its_rendering(monkeypatch, make_tokenizer, template, role):
    tokenizer = make_tokenizer(template)
    end = tokenizer.encode("<|im_end|>")[0]
    texts = ["Hello there", " I am here.\n", "bye"]
    (one,), _ = conversations(monkeypatch, tokenizer, [(text, end) for text in texts])
    replies = [{"role": role, "content": f"{len(text)} letters"} for text in texts[:2]]
    first, second, third = ({"role": "assistant", "content": text} for text in texts)
    prompt = [{"role": "user", "content": "Say 1"}]
    whole = tokenizer.encode(tokenizer.render([*prompt, first, replies[0], second, replies[1], third]))
    ids = [*one.prompt.tokens.tolist(), *one.tokens.tolist()]
    assert ids == whole[: len(ids)] and not tokenizer.decode(whole[len(ids) :]).strip()
    assert one.sampled.tolist() == (one.logprobs == -1).tolist()
    sampled = [*texts[0], *texts[1], *texts[2]]
    assert tokenizer.decode(one.tokens[one.sampled]) == "".join(sampled)
    assert np.sum(one.tokens[one.sampled] == end) == 3
    assert one.finish_reason == "stop" and one.episode.turns == 3 and not one.episode.cut and one.text == "bye"
    assert one.episode.tool_calls == 2 and one.episode.reward == 3
    assert "".join(part.text for part in one.episode.parts) == tokenizer.decode(one.tokens, skip_special_tokens=False)
    assert one.prompt.messages == ({"role": "user", "content": "Say 1"},)


def test_an_end_that_the_template_does_not_write_is_followed_by_all_that_it_does(monkeypatch, make_tokenizer):
    tokenizer = make_tokenizer()
    other = tokenizer.encode("x")[0]
    tokenizer.stop_ids |= {other}
    (one,), _ = conversations(monkeypatch, tokenizer, [("Hello", other)] * 3)
    text = tokenizer.decode(one.tokens, skip_special_tokens=False)
    assert text.startswith(
        "Hellox<|im_end|>\n<|im_start|>tool\n6 letters<|im_end|>\n<|im_start|>assistant\nHellox<|im_"
    )


def test_the_rest_of_the_length_limits_every_turn(monkeypatch, make_tokenizer):
    tokenizer = make_tokenizer()
    end = tokenizer.encode("<|im_end|>")[0]
    turn = len(tokenizer.encode("Hello")) + 1
    (one,), calls = conversations(monkeypatch, tokenizer, [("Hello", end)] * 3)
    between = (len(one.tokens) - 3 * turn) // 2
    # The second turn is cut off by one token: the environment sees it, and its reply is not shown.
    most = 2 * turn + between - 1
    (one,), calls = conversations(monkeypatch, tokenizer, [("Hello", end)] * 3, max_completion_length=most)
    assert [call["sampling"][0].max_new_tokens for call in calls] == [most, turn - 1]
    assert len(one.tokens) == most and one.finish_reason == "length" and one.episode.turns == 2 and one.sampled[-1]
    assert one.episode.reward == 2
    # A reply that leaves no room for a turn is left out.
    (one,), calls = conversations(monkeypatch, tokenizer, [("Hello", end)] * 3, max_completion_length=turn + between)
    assert len(calls) == 1 and len(one.tokens) == turn and one.finish_reason == "length"
    (one,), calls = conversations(monkeypatch, tokenizer, [("Hello", end)] * 3, max_turns=2)
    assert len(calls) == 2 and one.finish_reason == "stop" and one.episode.cut and one.episode.turns == 2
    assert one.sampled[-1] and one.episode.reward == 2


class Shorter(Echo):
    """Instances of the same row that end after different numbers of turns."""

    count = 0

    def reset(self, row):
        Shorter.count += 1
        self.number = Shorter.count
        return super().reset(row)

    def step(self, completion):
        return [] if self.number == 2 else super().step(completion)


class Differing(Echo):
    """Instances of the same row with prompts of their own."""

    count = 0

    def reset(self, row):
        Differing.count += 1
        return super().reset({"points": Differing.count})


def test_a_turn_is_one_call_whose_groups_share_a_prompt_only_if_it_is_the_same(monkeypatch, make_tokenizer):
    tokenizer = make_tokenizer()
    end = tokenizer.encode("<|im_end|>")[0]
    prompts, turns = (prompt_of(1), prompt_of(2)), [("Hello", end)] * 3
    answers, calls = conversations(monkeypatch, tokenizer, turns, Shorter, prompts, group=2)
    assert [call["answers"] for call in calls] == [2, 1, 1] and len(calls[0]["prompts"]) == 2
    # Every answer draws from the same stream in all turns.
    assert [call["streams"] for call in calls] == [[0, 1, 2, 3], [0, 2, 3], [0, 2, 3]]
    assert {call["slots"] for call in calls} == {4} and all(call["keep_slots"] for call in calls)
    assert [one.group for one in answers] == [0, 0, 1, 1] and [one.episode.turns for one in answers] == [3, 1, 3, 3]
    answers, calls = conversations(monkeypatch, tokenizer, turns, Differing, prompts, group=2)
    assert calls[0]["answers"] == 1 and len(calls[0]["prompts"]) == 4
    assert len({one.prompt.tokens.tobytes() for one in answers}) == 4


def test_a_prompt_that_is_that_of_the_row_keeps_its_tokens(monkeypatch, make_tokenizer):
    class Plain(Echo):
        def reset(self, row):
            super().reset(row)
            return row["prompt"]

    tokenizer = make_tokenizer()
    end = tokenizer.encode("<|im_end|>")[0]
    row = prompt_of(1, tokens=(5, 6, 7))
    row = sample.replace(row, messages=({"role": "user", "content": "Say 1"},))
    (one,), _ = conversations(monkeypatch, tokenizer, [("Hello", end)] * 3, Plain, (row,))
    assert one.prompt is row
    with pytest.raises(DataError, match=r"a row: the prompt .* has \d+ tokens, and answers of .*=200 leave room for 4"):
        conversations(monkeypatch, tokenizer, [("Hello", end)] * 3, length=204)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (THINKING, "it writes an earlier answer that has thoughts differently .* Set data.chat_template"),
        (LAST_MARKED, "it writes an earlier answer differently"),
        ("", "needs a chat template, and the tokenizer of 'tiny' has none"),
    ],
)
def test_a_template_that_rewrites_earlier_turns_is_refused(make_tokenizer, template, message):
    with pytest.raises(ConfigError, match=message):
        TurnTemplate(make_tokenizer(template)).check()


def test_the_template_of_the_documentation_is_taken(make_tokenizer):
    lines = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("    {% for m in messages %}"))
    template = TurnTemplate(make_tokenizer("".join(f"{line[4:]}\n" for line in lines[first : first + 4])))
    template.check()
    ids = template.prompt(
        [{"role": "user", "content": "Q"}, {**ANSWER, "content": "A"}, {"role": "tool", "content": "R"}]
    )
    text = make_tokenizer().decode(ids, skip_special_tokens=False)
    user, assistant = "<|im_start|>user\n", "<|im_start|>assistant\n"
    assert text == f"{user}Q<|im_end|>\n{assistant}A<|im_end|>\n{user}R<|im_end|>\n{assistant}"


def test_a_template_that_rewrites_a_conversation_later_is_an_error_of_the_row(make_tokenizer):
    for template in (None, BRACKETS):
        TurnTemplate(make_tokenizer(template)).check()
    late = BRACKETS.replace("{{ m.content }}<|im_end|>", "{% if messages | length > 2 %}-{% endif %}{{ m.content }}!")
    history = [{"role": "user", "content": "Q"}, ANSWER]
    with pytest.raises(DataError, match=r"writes the earlier conversation differently once messages \(user\) follow"):
        TurnTemplate(make_tokenizer(late)).continuation(history, [{"role": "user", "content": "R"}], 0, {})
