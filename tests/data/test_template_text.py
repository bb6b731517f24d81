"""What templates take from outside, and the date and variables that a run fixes in them."""

import datetime
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from jaxft.config import resolve, with_overrides
from jaxft.data.chat import template_text
from jaxft.data.chat.encode import encode
from jaxft.data.chat.template_text import own_text, reads_of, with_date, with_defaults
from jaxft.data.formats import Conversation
from jaxft.data.tokenizers import load
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import ConfigError, DataError
from jaxft.runs.folder import dated, open_run

CHAT = [{"role": "user", "content": "Hi"}]
# The date stands in a macro, in a loop and at the top, in two formats, as published templates have it.
CLOCK = (
    "{%- macro head() -%}{{ 'On ' + strftime_now('%Y-%m-%d') }}{%- endmacro -%}"
    "{%- if not date_string is defined %}{% if strftime_now is defined %}"
    '{% set date_string = strftime_now(format="%d %b %Y") %}{% endif %}{% endif -%}'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ head() }} {{ date_string }} {{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SWITCH = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture
def folder(tmp_path, tokenizer_of):
    """folder(template): a folder with a small tokenizer."""

    def write(template, kind="chatml"):
        tokenizer_of(kind, template).save(tmp_path / kind)
        return str(tmp_path / kind)

    return write


def set_today(monkeypatch, day):
    """Makes transformers' templates and jaxft's runs take place on a day."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr(template_text, "today", lambda: day)


def by_transformers(path, messages, **kwargs):
    return PreTrainedTokenizerFast.from_pretrained(path).apply_chat_template(messages, tokenize=False, **kwargs)


def test_an_export_renders_on_every_later_day_as_on_that_of_training(folder, tmp_path, monkeypatch):
    path = folder(CLOCK)
    set_today(monkeypatch, "2026-11-29")
    on_that_day = by_transformers(path, CHAT, add_generation_prompt=True)
    assert "On 2026-11-29 29 Nov 2026 Hi" in on_that_day
    tokenizer = load.tokenizer_of(with_overrides({"model.path": path, "data.train": "rows.jsonl"}))
    assert tokenizer.template_date == "2026-11-29"
    tokenizer.save(tmp_path / "export")
    set_today(monkeypatch, "2027-01-02")
    assert by_transformers(path, CHAT, add_generation_prompt=True) != on_that_day
    assert tokenizer.render(CHAT, add_generation_prompt=True) == on_that_day
    assert by_transformers(tmp_path / "export", CHAT, add_generation_prompt=True) == on_that_day
    assert load_tokenizer(tmp_path / "export").render(CHAT, add_generation_prompt=True) == on_that_day
    # A date that somebody gives still wins.
    assert "On 2026-11-29 X Hi" in by_transformers(tmp_path / "export", CHAT, date_string="X")


def test_a_run_keeps_the_day_on_which_it_began(folder, tmp_path, monkeypatch):
    given = {"model.path": folder(CLOCK), "data.train": "rows.jsonl", "output_dir": str(tmp_path / "run")}
    set_today(monkeypatch, "2026-11-29")
    config, tokenizer = dated(with_overrides(given), load.tokenizer_of(with_overrides(given)))
    assert config.data.template_date == "2026-11-29"
    open_run(config, reads={}, template=tokenizer.chat_template)
    set_today(monkeypatch, "2027-01-02")
    again, tokenizer_again = dated(with_overrides(given), load.tokenizer_of(with_overrides(given)))
    assert again == config
    assert (
        tokenizer_again.chat_template == tokenizer.chat_template == (tmp_path / "run/chat_template.jinja").read_text()
    )
    # Another run, on the same day but with a date of its own.
    chosen = with_overrides(given | {"data.template_date": "2024-07-26"})
    assert "On 2024-07-26 26 Jul 2024" in dated(chosen, load.tokenizer_of(chosen))[1].render(CHAT)
    # What does not read the clock has no date.
    plain = with_overrides(given | {"data.chat_template": SWITCH})
    config, tokenizer = dated(plain, load.tokenizer_of(plain))
    assert config == plain and tokenizer.chat_template == SWITCH
    assert resolve(config.to_dict()) == config


def test_dates_that_cannot_be_fixed_are_refused(folder):
    run = {"model.path": folder(SWITCH), "data.train": "rows.jsonl"}
    with pytest.raises(ConfigError, match="does not read the clock. Set data.template_date to None"):
        load.tokenizer_of(with_overrides(run | {"data.template_date": "2026-11-29"}))
    with pytest.raises(ConfigError, match="'2026-02-30' is no date"):
        with_overrides(run | {"data.template_date": "2026-02-30"})
    with pytest.raises(ConfigError, match="a date such as 2026-11-29"):
        with_overrides(run | {"data.template_date": "yesterday"})
    with pytest.raises(ConfigError, match="shows the fixed date 2026-11-29"):
        fixed = with_date(CLOCK, "2026-11-29")
        load.tokenizer_of(with_overrides(run | {"data.chat_template": fixed, "data.template_date": "2026-11-30"}))
    for computed in ("{{ strftime_now(form) }}", "{% set now = strftime_now %}{{ now('%Y') }}"):
        with pytest.raises(ConfigError, match="a copy of the template that calls strftime_now with a text in quotes"):
            with_date(computed, "2026-11-29")


@pytest.mark.parametrize("drawn", ["{{ ['a', 'b'] | random }}", "{{ lipsum(n=1) }}"])
def test_templates_that_write_something_else_every_time_are_refused(drawn, folder):
    with pytest.raises(DataError, match="something else at every rendering"):
        load_tokenizer(folder(SWITCH + drawn)).render(CHAT)


def test_variables_of_a_run_are_those_of_its_exports(folder, tmp_path):
    path = folder(SWITCH)
    values = {"enable_thinking": False}
    config = with_overrides({"model.path": path, "data.train": "rows.jsonl", "data.chat_template_kwargs": values})
    tokenizer = load.tokenizer_of(config)
    wanted = by_transformers(path, CHAT, add_generation_prompt=True, **values)
    assert wanted != by_transformers(path, CHAT, add_generation_prompt=True)
    assert tokenizer.render(CHAT, add_generation_prompt=True) == wanted
    tokenizer.save(tmp_path / "export")
    assert by_transformers(tmp_path / "export", CHAT, add_generation_prompt=True) == wanted
    explicit = by_transformers(tmp_path / "export", CHAT, add_generation_prompt=True, enable_thinking=True)
    assert explicit == by_transformers(path, CHAT, add_generation_prompt=True, enable_thinking=True)
    # A row's own come first.
    row = Conversation(
        row=0, where="row 1", format="messages", messages=(*CHAT, {"role": "assistant", "content": "Ho"}),
        template_kwargs={"enable_thinking": True},
    )  # fmt: skip
    assert "<think>" not in tokenizer.decode(encode(row, tokenizer)[0].tokens)


def test_a_tokenizer_with_several_templates_keeps_them(tokenizer_of, tmp_path):
    """The run folder keeps the default one, by which an evaluation must find the others fixed too."""
    tools = "{{ tools | length }}" + CLOCK
    tokenizer_of("chatml").save(tmp_path)
    backend = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    backend.chat_template = {"default": SWITCH, "tool_use": tools}
    backend.save_pretrained(tmp_path)
    given = {"data.chat_template_kwargs": {"enable_thinking": False}, "data.template_date": "2024-02-29"}
    trained = load.tokenizer_of(with_overrides({"model.path": str(tmp_path), "data.train": "rows.jsonl"} | given))
    assert trained.template_date == "2024-02-29"
    later = load_tokenizer(tmp_path, chat_template=trained.chat_template)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert later.render(CHAT, add_generation_prompt=True) == trained.render(CHAT, add_generation_prompt=True)
    assert later.chat_templates.keys() == trained.chat_templates.keys() == {"default", "tool_use"}
    assert "On 2024-02-29" in trained.render(CHAT, tools=[tool])
    # Another template takes the place of all of them.
    assert load_tokenizer(tmp_path, chat_template="chatml").chat_templates.keys() == {"default"}


def test_any_value_can_stand_in_a_template(tokenizer_of):
    values = {"a": "'\"\\ \n{{ %} #} é 🙂", "b": None, "c": [1, -2.5, True], "d": {"x": {"y": "z"}}}
    shown = "{{ [a, b, c, d] | tojson }}"
    tokenizer = tokenizer_of("chatml", shown).backend
    given = tokenizer.apply_chat_template(CHAT, tokenize=False, **values)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, chat_template=with_defaults(shown, values)) == given


def test_variables_that_no_template_reads_are_refused_by_name(folder):
    path = folder(SWITCH)
    with pytest.raises(ConfigError, match="no variable 'enable_thinkin'. Did you mean 'enable_thinking'\\?"):
        load_tokenizer(path, chat_template_kwargs={"enable_thinkin": False})
    with pytest.raises(ConfigError, match="'messages' is what every rendering gives itself"):
        load_tokenizer(path, chat_template_kwargs={"messages": []})
    with pytest.raises(DataError, match="no variable 'thinking'.* It reads enable_thinking."):
        load_tokenizer(path).render(CHAT, thinking=True)
    with pytest.raises(ConfigError, match="has no chat template"):
        load_tokenizer(folder(None, "plain"), chat_template_kwargs={"enable_thinking": False})


def test_what_published_templates_read(tokenizer_of):
    trl = pytest.importorskip("trl")
    tokenizer = tokenizer_of("plain").backend
    read = set()
    for file in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        text = file.read_text()
        reads = reads_of(text)
        read |= reads.variables
        assert not reads.computed_format and reads.random is None and own_text(text) == text
        fixed = with_defaults(with_date(text, "2001-02-03"), {"unknown": "x"})
        assert own_text(fixed) == text
        assert bool(reads.formats) == ("strftime_now" in text)
        if reads.formats:
            rendered = tokenizer.apply_chat_template(CHAT, chat_template=fixed, tokenize=False)
            assert any(datetime.date(2001, 2, 3).strftime(form) in rendered for form in reads.formats), file.name
    assert {"enable_thinking", "reasoning_effort", "date_string", "model_identity", "preserve_thinking"} <= read
    assert not {"role", "tool_call", "loop_messages"} & read  # which the templates set themselves
