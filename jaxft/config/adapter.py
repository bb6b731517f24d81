"""The adapter section: which adapter is trained beside the frozen model, and its settings."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar, get_args

from jaxft.config.fields import ABOVE_ZERO, BELOW_ONE, COMMA_SEPARATED, ReadBy, Section, Spelling
from jaxft.errors import ConfigError

Kind = Literal["none", "lora", "vera", "ia3", "prompt", "prefix"]
ADAPTERS: tuple[str, ...] = tuple(kind for kind in get_args(Kind) if kind != "none")
Number = TypeVar("Number", int, float)

LORA = ReadBy("adapter.kind", ("lora",))
# Most configs fill these: another kind ignores them, so that adapter.kind can be overridden alone.
LORA_IF_READ = ReadBy("adapter.kind", ("lora",), refuse=False)
LORA_OR_VERA = ReadBy("adapter.kind", ("lora", "vera"), refuse=False)
LINEAR_LAYERS = ReadBy("adapter.kind", ("lora", "vera", "ia3"), refuse=False)
VIRTUAL_TOKENS = ReadBy("adapter.kind", ("prompt", "prefix"), refuse=False)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Section):
    """What is trained beside the model. `kind="none"` trains the model itself: all of it, or `model.trainable`."""

    kind: Annotated[Kind, "which adapter; `none` trains the model itself; see [adapters](adapters.md)"] = "lora"
    r: Annotated[
        int, ABOVE_ZERO, LORA_OR_VERA, "rank; at most the smaller side of every layer that the adapter is attached to"
    ] = 16
    alpha: Annotated[float, ABOVE_ZERO, LORA_IF_READ, "numerator of the scale alpha / r"] = 32.0
    dropout: Annotated[
        float, BELOW_ONE, LORA_OR_VERA, "share of the adapter's inputs that is dropped in training, rounded to 1/256"
    ] = 0.0
    target_modules: Annotated[
        str,
        LINEAR_LAYERS,
        COMMA_SEPARATED,
        "layers that get an adapter: `all-linear` (all but the LM head), or names, comma separated: `q_proj,v_proj`",
    ] = "all-linear"
    use_rslora: Annotated[bool, LORA, "scale by alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)"] = False
    use_dora: Annotated[
        bool,
        LORA,
        "train the lengths of the kernels' columns separately from their directions (DoRA, arXiv:2402.09353)",
    ] = False
    init_lora_weights: Annotated[
        str,
        LORA,
        Spelling(
            r"default|gaussian|(pissa|loftq|eva)(_niter_\d+)?|olora",
            ("default", "gaussian", "pissa", "pissa_niter_N", "olora", "loftq", "loftq_niter_N", "eva", "eva_niter_N"),
        ),
        "initial values of A and B; see [adapters](adapters.md)",
    ] = "default"
    exclude_modules: Annotated[
        str | None,
        LORA,
        COMMA_SEPARATED,
        "layers of `adapter.target_modules` that get no adapter: names, comma separated",
    ] = None
    layers_to_transform: Annotated[
        str | None, LORA, COMMA_SEPARATED, "numbers of the decoder layers that get adapters: `0-3,8`; None: all"
    ] = None
    rank_pattern: Annotated[
        str | None,
        LORA,
        COMMA_SEPARATED,
        "ranks of single layers, by PEFT's patterns: `q_proj:8,layers.0.mlp.down_proj:32`",
    ] = None
    alpha_pattern: Annotated[
        str | None, LORA, COMMA_SEPARATED, "alphas of single layers, in the form of `adapter.rank_pattern`"
    ] = None
    modules_to_save: Annotated[
        str | None,
        COMMA_SEPARATED,
        "modules that are trained whole, in float32, beside the adapter: names, comma separated: `embed_tokens,norm`",
    ] = None
    feedforward_modules: Annotated[
        str,
        ReadBy("adapter.kind", ("ia3",)),
        COMMA_SEPARATED,
        "layers of `adapter.target_modules` whose inputs are scaled instead of their outputs: names, comma separated",
    ] = "down_proj"
    num_virtual_tokens: Annotated[
        int, ABOVE_ZERO, VIRTUAL_TOKENS, "number of virtual tokens at the start of every row; they take up positions"
    ] = 20
    prompt_init_text: Annotated[
        str | None,
        ReadBy("adapter.kind", ("prompt",)),
        "text whose embeddings are the initial prompt; None: the embeddings of random tokens",
    ] = None

    @property
    def targets(self) -> tuple[str, ...]:
        """Module names, or the single name `all-linear` (every linear layer but the LM head)."""
        return split_names(self.target_modules)

    @property
    def excluded(self) -> tuple[str, ...]:
        """Module names of exclude_modules."""
        return split_names(self.exclude_modules)

    @property
    def saved(self) -> tuple[str, ...]:
        """Module names of modules_to_save."""
        return split_names(self.modules_to_save)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Layer numbers of layers_to_transform; None for all. Raises ConfigError for a text that cannot be read."""
        return None if self.layers_to_transform is None else parse_layers(self.layers_to_transform)

    @property
    def ranks(self) -> dict[str, int]:
        """rank_pattern as pattern -> rank. Raises ConfigError for a text that cannot be read."""
        return parse_pattern("adapter.rank_pattern", self.rank_pattern, int)

    @property
    def alphas(self) -> dict[str, float]:
        """alpha_pattern as pattern -> alpha. Raises ConfigError for a text that cannot be read."""
        return parse_pattern("adapter.alpha_pattern", self.alpha_pattern, float)

    @property
    def by_data(self) -> bool:
        """Whether A is initialized from the training data (EVA)."""
        return self.kind == "lora" and self.init_lora_weights.startswith("eva")

    @property
    def virtual_tokens(self) -> int:
        """Number of virtual tokens at the start of every row; 0 for adapters without them."""
        return self.num_virtual_tokens if VIRTUAL_TOKENS.holds(self.kind) else 0

    def check(self) -> None:
        if self.kind == "none":
            return
        if not self.targets:
            raise ConfigError("adapter.target_modules is empty: give 'all-linear' or names such as 'q_proj,v_proj'")
        _ = self.layers, self.ranks, self.alphas  # each raises ConfigError if its text cannot be read
        if self.layers == ():
            raise ConfigError("adapter.layers_to_transform is empty: give layers such as '0-3,8', or None for all")
        if self.init_lora_weights.startswith("loftq") and self.use_dora:
            raise ConfigError(
                f"adapter.init_lora_weights={self.init_lora_weights!r} changes the base that the lengths of "
                "adapter.use_dora are taken from: set adapter.use_dora to False, or adapter.init_lora_weights to "
                "'default'"
            )


def split_names(text: str | None) -> tuple[str, ...]:
    """The names of a comma-separated list."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def parse_layers(text: str) -> tuple[int, ...]:
    """The layer numbers of a text such as `0-3,8`, sorted.

    Raises ConfigError for a part that is neither a number nor a range.
    """
    numbers: set[int] = set()
    for part in split_names(text):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            raise ConfigError(
                f"adapter.layers_to_transform={text!r}: {part!r} is neither a layer such as 8 nor a range such as 0-3"
            )
        numbers |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(numbers))


def parse_pattern(key: str, text: str | None, kind: Callable[[str], Number]) -> dict[str, Number]:
    """The entries of a text such as `q_proj:8,o_proj:32`: pattern -> number above zero.

    Raises ConfigError for an entry of another form.
    """
    out = {}
    for part in split_names(text):
        pattern, _, value = part.rpartition(":")
        try:
            out[pattern.strip()] = kind(value)
            re.compile(pattern)
        except (ValueError, re.error):
            raise ConfigError(f"{key}={text!r}: {part!r} is not of the form pattern:number, such as q_proj:8") from None
        if not pattern.strip() or out[pattern.strip()] <= 0:
            raise ConfigError(f"{key}={text!r}: {part!r} needs a pattern and a number above zero")
    return out
