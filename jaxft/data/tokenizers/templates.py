"""The chat templates that come with jaxft, by name, and how a template is read and fixed for a tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxft.assets import ASSETS
from jaxft.data.chat import template_text
from jaxft.errors import ConfigError, ModelError, did_you_mean
from jaxft.home import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS = "eos_token"  # stands for a tokenizer's own, whatever it is called
# The tokens that each template writes, which a tokenizer must have as tokens; the last one ends an answer.
BUILT_IN = {
    "alpaca": (EOS,),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "deepseek_r1": ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama2": (EOS,),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]", EOS),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "qwen3": ("<|im_start|>", "<think>", "</think>", "<|im_end|>"),
    "vicuna": (EOS,),
    "zephyr": (EOS,),
}


def built_in(name: str) -> str:
    """The text of the built-in template of a name."""
    return (ASSETS / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def fitting(backend: "PreTrainedTokenizerFast") -> list[str]:
    """The built-in templates whose tokens a tokenizer has; those with marks of their own before those without."""
    names = [name for name in BUILT_IN if not _absent(name, backend)]
    return sorted(names, key=lambda name: -len(BUILT_IN[name]))


def read_template(given: str, backend: "PreTrainedTokenizerFast", path: str) -> str:
    """The text of a template that somebody gives for a tokenizer.

    given: the name of a built-in template, Jinja text, or the path of a file. path: of the tokenizer, for errors.
    Raises ModelError for a file that cannot be read, and for a built-in template with tokens that are not the
    tokenizer's: they would be split, and no end of an answer would be learned.
    """
    if given in BUILT_IN:
        if absent := _absent(given, backend):
            others = ", ".join(fitting(backend)) or "none"
            written = ", ".join("an end-of-text token" if token == EOS else token for token in absent)
            raise ModelError(
                f"the chat template {given!r} writes {written}, and the tokenizer of {path!r} has no such token. "
                f"Built-in templates that fit this tokenizer: {others}."
            )
        return built_in(given)
    if "{{" in given or "{%" in given:
        return given
    given = local_path(given)
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ModelError(
            f"cannot read the chat template {given!r}: {reason}.{did_you_mean(given, BUILT_IN)} It may be a Jinja "
            f"file, Jinja text, or one of the built-in templates: {', '.join(BUILT_IN)}."
        ) from error


def replaced(own: Any, text: str) -> Any:
    """The template of a tokenizer, or its templates by name, after another one took the place of `own`.

    A tokenizer with several keeps them all if the other one is its default with values that a run has fixed in it,
    which then stand in all of them.
    """
    bare = template_text.own_text(text)
    if isinstance(own, Mapping) and own.get("default") == bare:
        fixed = text[: len(text) - len(bare)]
        return {name: fixed + template for name, template in own.items()}
    return text


def fixed_template(given: Any, date: str | None, values: Mapping[str, Any], path: str) -> Any:
    """The template of a tokenizer, or its templates by name, with a date and values of variables in their text.

    path: of the tokenizer, for errors. Raises ConfigError if there is no template, it does not read one of the
    variables, or it does not read the clock.
    """
    templates = dict(given) if isinstance(given, Mapping) else {"": given}
    if None in templates.values():
        raise ConfigError(
            f"the tokenizer of {path!r} has no chat template, so nothing reads data.chat_template_kwargs or "
            "data.template_date: leave them out, or set data.chat_template"
        )
    known = frozenset().union(*(template_text.reads_of(text).variables for text in templates.values()))
    if problem := template_text.unread(values, known):
        raise ConfigError(f"chat_template_kwargs: {problem}")
    for name, text in templates.items():
        defaults = template_text.with_defaults(text, values)
        templates[name] = template_text.with_date(defaults, date) if date is not None else defaults
    dates = {template_text.date_in(text) for text in templates.values()} - {None}
    if date is not None and dates != {date}:
        shown = f"shows the fixed date {', '.join(map(str, dates))}" if dates else "does not read the clock"
        raise ConfigError(f"data.template_date={date!r}: the chat template {shown}. Set data.template_date to None.")
    return templates if isinstance(given, Mapping) else templates[""]


def _absent(name: str, backend: "PreTrainedTokenizerFast") -> list[str]:
    """The tokens of a built-in template that a tokenizer does not have."""
    vocabulary = backend.get_vocab()
    return [
        token for token in BUILT_IN[name] if (backend.eos_token is None if token == EOS else token not in vocabulary)
    ]
