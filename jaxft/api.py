"""The public functions: what the commands and the notebooks call."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxft import config as config_module
from jaxft.adapters.combine import combine as combine_adapters  # noqa: F401
from jaxft.checkpoint.load import LoadedModel
from jaxft.checkpoint.load import load_model as load_model
from jaxft.checkpoint.named_adapters import load_adapters as load_adapters
from jaxft.checkpoint.named_adapters import write_named as write_adapter  # noqa: F401
from jaxft.comparison.compare import compare as compare
from jaxft.config import RunConfig
from jaxft.conversion.convert import convert as convert
from jaxft.data.tokenizers.load import load_tokenizer as load_tokenizer
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.generation.text import Answer, Prompt, as_prompts, generate_text
from jaxft.planning.client import plan as plan
from jaxft.runs.evaluate import evaluate as evaluate
from jaxft.runs.export import export as export
from jaxft.runs.rewards import best_of as best_of
from jaxft.runs.rewards import score as score
from jaxft.runs.sample import sample as sample
from jaxft.runs.session import Session as Session
from jaxft.runs.train import train as train


def get_config(path_with_arg: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> RunConfig:
    """The checked run that a config describes: a Python or YAML file, a run folder, or the name of a shipped config.

    path_with_arg: with `:smoke` behind it if wanted. overrides: `{"train.batch_size": 4}` or `["train.batch_size=4"]`.
    Raises ConfigError.
    """
    return config_module.load(path_with_arg, overrides)


def generate(
    model: LoadedModel,
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    slots: int = 32,
    on_text: Callable[[int, str], None] | None = None,
    on_thoughts: Callable[[int, str], None] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Answer | list[Answer]:
    """The answer to each prompt, without the prompt and without special tokens; of a single prompt, its answer.

    prompts: a text, continued as it is, or a conversation, a list of chat messages that the chat template renders; or a
    list of texts and conversations. An answer is a string with the attributes `reasoning_content`, the thoughts before
    an answer in a chat, which are no part of it, and `finish_reason`, `stop` or `length`.
    max_new_tokens to seed: see `jaxft.generation.settings.Sampling`. temperature: 0 is greedy. min_p: drop tokens less
    probable than min_p times the most probable one. repetition_penalty: values above 1 penalise tokens already used.
    stop: texts that end an answer and are cut off. slots: most prompts decoded at a time. on_text: called with (index
    of the prompt, piece) whenever an answer has grown; on_thoughts: likewise for the thoughts before it.
    chat_template_kwargs: variables of the chat template, such as `{"enable_thinking": False}`; a run's own by default.
    Raises ConfigError for a setting outside of its range, DataError for a prompt that the model cannot take.
    """
    from jaxft.generation.settings import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )
    prompt_list, single = as_prompts(prompts)
    done = generate_text(
        model.module,
        tokenizer,
        prompt_list,
        sampling=sampling,
        slots=slots,
        on_text=on_text,
        on_thoughts=on_thoughts,
        chat_template_kwargs=chat_template_kwargs,
    )
    answers = [Answer.of(one) for one in done]
    return answers[0] if single else answers
