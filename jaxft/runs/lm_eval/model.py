"""The model class that lm-evaluation-harness calls, registered there as `jaxft`. It imports that library."""

import logging
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxft.checkpoint.load import LoadedModel, load_model
from jaxft.config import MeshConfig
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.data.tokenizers.tokenizer import TemplateRefusal, Tokenizer
from jaxft.errors import ConfigError, DataError, ModelError
from jaxft.runs.lm_eval.answers import Question, answers_to, sampling_of
from jaxft.runs.lm_eval.likelihoods import Continuation, Likelihoods
from jaxft.runs.lm_eval.run import check_one_process
from jaxft.sharding.mesh import make_mesh_plan

MAX_GEN_TOKS = 256  # tokens of an answer whose task does not say how many: the harness's own default

log = logging.getLogger(__name__)


@register_model("jaxft")
class JaxftLM(TemplateLM):
    """Any model, adapter or quantised base that jaxft loads, for the tasks of lm-evaluation-harness.

    pretrained: a path as of `jaxft.load_model`, or a model in memory, which needs a tokenizer. dtype, quantization,
    base: as of `jaxft.load_model`. batch_size: rows that are computed at a time. max_length: most tokens of a row,
    by default all positions of the model; longer ones lose their beginning. add_bos_token: whether BOS stands before
    every text; None: as the tokenizer does. chat_template, chat_template_args: in place of the tokenizer's own, and
    variables of it. seed: of sampled answers. Other arguments, such as `device`, are for other models. Raises
    ConfigError in one of several processes.
    """

    def __init__(
        self,
        pretrained: str | LoadedModel,
        tokenizer: Tokenizer | None = None,
        *,
        dtype: str = "float32",
        quantization: str | None = None,
        base: str | None = None,
        allow_unknown: Sequence[str] = (),
        batch_size: int | str = 8,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        chat_template: str | None = None,
        chat_template_args: dict[str, Any] | None = None,
        seed: int = 0,
        **_: Any,
    ) -> None:
        super().__init__()
        check_one_process()
        if isinstance(pretrained, str):
            tokenizer = tokenizer or load_tokenizer(
                pretrained, base=base, chat_template=chat_template, chat_template_kwargs=chat_template_args
            )
            pretrained = load_model(
                pretrained,
                dtype=dtype,
                quantization=quantization,
                base=base,
                allow_unknown=allow_unknown,
                mesh=make_mesh_plan(MeshConfig()),
            )
        if tokenizer is None:
            raise ConfigError("a model in memory needs its tokenizer: give tokenizer=jaxft.load_tokenizer(PATH)")
        if pretrained.module.config.head == "score":
            raise ModelError(
                f"{pretrained.base} is a reward model, which has no language model head: use `jaxft score`"
            )
        self.model, self.own = pretrained, tokenizer
        self.tokenizer = tokenizer.backend
        self.batch_size = _number_of("batch_size", batch_size)
        positions = pretrained.module.config.max_position_embeddings - pretrained.module.virtual_tokens
        self.max_length = positions if max_length is None else min(_number_of("max_length", max_length), positions)
        self.add_bos_token, self.seed = add_bos_token, seed
        self._likelihoods = Likelihoods(pretrained.module, self.batch_size)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self.own.eos_id is None:
            raise ModelError(f"the tokenizer of {self.model.base} has no end token: set eos_token in its files")
        return int(self.own.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: BOS, or the end token."""
        return self.eot_token_id if self.own.bos_id is None else int(self.own.bos_id)

    @property
    def max_gen_toks(self) -> int:
        """Most tokens of an answer, unless its task says how many."""
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """The name by which requests are cached."""
        return str(self.tokenizer.name_or_path or self.model.base).replace("/", "__")

    def apply_chat_template(self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text. A template that refuses it gets it without its system message, as the harness does it.

        add_generation_prompt: else the last message is the beginning of an answer, which the model continues.
        """
        more = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return self.own.apply_template(chat_history, **more)
        except TemplateRefusal as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            log.warning("the chat template refuses a system message, which is left out: %s", error)
            return self.own.apply_template(rest, **more)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text, with special tokens as the tokenizer adds them unless the text begins with BOS."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            special = False
        ids = self.own.encode(string, add_special_tokens=special is not False)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.own.decode(tokens, skip_special_tokens=skip_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each continuation, given (texts, context, continuation) as token ids."""
        given = [self._continuation(context, continuation) for _, context, continuation in requests]
        out = self._likelihoods.score(given)
        for request, answer in zip(requests, out, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return out

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of max_length tokens, each of which is predicted once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in rolling:
                context, continuation = make_disjoint_window(window)
                windows.append((None, context, continuation))
                owners.append(number)
        out = [0.0] * len(requests)
        for number, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            out[number] += total
        for request, total in zip(requests, out, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return out

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt before its stop texts; long prompts lose their beginning."""
        questions = [self._question(*request.args) for request in requests]
        out = answers_to(self.model.module, self.own, questions, self.batch_size)
        for request, text in zip(requests, out, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return out

    def _question(self, context: str, settings: dict[str, Any]) -> Question:
        settings = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(settings.get("until"), eos=eos)
        sampling = sampling_of(settings, self.seed)
        room = self.max_length - sampling.max_new_tokens
        if room <= 0:
            raise ConfigError(
                f"a task asks for answers of max_gen_toks={sampling.max_new_tokens} tokens, which leave no room for a "
                f"prompt among the {self.max_length} positions of the model: lower it by --gen_kwargs=max_gen_toks=N"
            )
        prompt = self.tok_encode(context, left_truncate_len=room) or [self.prefix_token_id]
        return Question(prompt=prompt, sampling=sampling, until=tuple(until))

    def _continuation(self, context: Sequence[int], continuation: Sequence[int]) -> Continuation:
        """What the model reads and predicts: the last max_length + 1 tokens, of which the last is only predicted."""
        if len(continuation) > self.max_length:
            raise DataError(
                f"a continuation has {len(continuation)} tokens, and the model reads {self.max_length} at most: leave "
                "the task out, or use a model with more positions"
            )
        whole = [*(context or [self.prefix_token_id]), *continuation][-(self.max_length + 1) :]
        return Continuation(inputs=tuple(whole[:-1]), targets=tuple(continuation))


def _number_of(name: str, value: int | str) -> int:
    try:
        number = int(value)
    except ValueError as error:
        raise ConfigError(f"{name}={value!r} must be a number: jaxft does not look for one by itself") from error
    if number < 1:
        raise ConfigError(f"{name}={number} must be at least 1")
    return number
