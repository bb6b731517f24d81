"""The sections of methods that train on preferences: pairs of answers, or answers labelled good or bad."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from jaxft.config.adapter import split_names
from jaxft.config.fields import ABOVE_ZERO, NOT_NEGATIVE, ZERO_TO_ONE, Range
from jaxft.config.method_section import MethodSection, ReferenceSection
from jaxft.errors import ConfigError, did_you_mean

BELOW_HALF = Range(lambda value: 0 <= value < 0.5, "at least 0 and below 0.5")

DPO_LOSSES = (
    "sigmoid", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "sigmoid_norm", "sft",
)  # fmt: skip
SMOOTHED = ("sigmoid", "robust", "exo_pair")
BY_LENGTH = ("ipo", "sigmoid_norm")
# Losses of the difference of two scores. In others, a term that only cancels in the difference would be left over.
OF_DIFFERENCES = ("sigmoid", "robust", "hinge", "ipo", "exo_pair", "sigmoid_norm", "sft")
PAIR_METRICS = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")


@dataclass(frozen=True, kw_only=True)
class DPOConfig(ReferenceSection):
    """Direct preference optimization: pairs of a chosen and a rejected answer, against a frozen reference model."""

    HELD_OUT_METRICS = PAIR_METRICS
    ROWS = "pairs"

    beta: Annotated[
        float,
        ABOVE_ZERO,
        "strength of the tie to the reference model: larger values keep the model closer to it (arXiv:2305.18290)",
    ] = 0.1
    loss_type: Annotated[
        str,
        "the loss of a pair, or several, comma separated: `sigmoid`, `robust`, `hinge`, `ipo`, `exo_pair`, `nca_pair`, "
        "`bco_pair`, `sppo_hard`, `apo_zero`, `apo_down`, `sigmoid_norm`; among several also `sft`, the negative "
        "log-likelihood of chosen answers; see [preferences](preferences.md#losses)",
    ] = "sigmoid"
    loss_weights: Annotated[
        str | None, "factors of the losses of `method.dpo.loss_type`, comma separated: `0.8,0.2,1.0`; None: 1 each"
    ] = None
    label_smoothing: Annotated[
        float,
        BELOW_HALF,
        "probability that the labels of a pair are swapped, for `sigmoid` (conservative DPO), `robust` and `exo_pair`",
    ] = 0.0
    sft_weight: Annotated[
        float,
        NOT_NEGATIVE,
        "factor of the mean negative log-likelihood of the tokens of chosen answers, which is added (RPO, "
        "arXiv:2404.19733)",
    ] = 0.0
    ld_alpha: Annotated[
        float | None,
        ZERO_TO_ONE,
        "factor of those tokens of the longer answer that come after the length of the shorter one (LD-DPO, "
        "arXiv:2409.06411); None: all tokens count alike",
    ] = None
    use_weighting: Annotated[
        bool, "weigh each pair by how likely the model is to give both answers itself (WPO, arXiv:2406.11827)"
    ] = False
    f_divergence_type: Annotated[
        Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
        "the divergence that ties the model to the reference (f-DPO, arXiv:2309.16240)",
    ] = "reverse_kl"
    f_alpha_divergence_coef: Annotated[
        float, ABOVE_ZERO, "the alpha of `alpha_divergence`; it must not be 1, which is `reverse_kl`"
    ] = 0.5

    @property
    def losses(self) -> tuple[tuple[str, float], ...]:
        """(loss, its factor) in the order of `loss_type`. Raises ConfigError for a text that cannot be read."""
        names = split_names(self.loss_type)
        if self.loss_weights is None:
            return tuple((name, 1.0) for name in names)
        weights = [_number("method.dpo.loss_weights", self.loss_weights, x) for x in split_names(self.loss_weights)]
        if len(weights) != len(names):
            raise ConfigError(
                f"method.dpo.loss_weights={self.loss_weights!r} has {len(weights)} numbers for the {len(names)} losses "
                f"of method.dpo.loss_type={self.loss_type!r}: give one for each, or None"
            )
        return tuple(zip(names, weights, strict=True))

    @property
    def pair_losses(self) -> tuple[tuple[str, float], ...]:
        """The losses of pairs among `losses`."""
        return tuple((name, weight) for name, weight in self.losses if name != "sft")

    @property
    def nll_weight(self) -> float:
        """The factor of the negative log-likelihood of chosen answers: `sft_weight`, or that of the loss `sft`."""
        return self.sft_weight + sum(weight for name, weight in self.losses if name == "sft")

    def check(self) -> None:
        names = [name for name, _ in self.losses]
        for name in names:
            if name not in DPO_LOSSES:
                raise ConfigError(
                    f"method.dpo.loss_type={self.loss_type!r}: {name!r} is not one of {', '.join(DPO_LOSSES)}."
                    f"{did_you_mean(name, DPO_LOSSES)}"
                )
        if len(set(names)) < len(names) or not self.pair_losses:
            raise ConfigError(
                f"method.dpo.loss_type={self.loss_type!r} must name at least one loss of pairs, and none twice. "
                "To train on chosen answers alone, use method.name='sft'."
            )
        self._check_smoothing(names)
        self._check_nll(names)
        if self.ld_alpha is not None and (named := _among(names, BY_LENGTH)):
            raise ConfigError(
                f"method.dpo.ld_alpha={self.ld_alpha} corrects sums for the lengths of answers, which "
                f"method.dpo.loss_type={named} divides by already. Set one of them to None or to another loss."
            )
        self._check_divergence(names)

    def _check_smoothing(self, names: list[str]) -> None:
        if self.label_smoothing and not set(names) & set(SMOOTHED):
            raise ConfigError(
                f"method.dpo.label_smoothing={self.label_smoothing} is read by none of the losses of "
                f"method.dpo.loss_type={self.loss_type!r}, only by {', '.join(SMOOTHED)}. Set it to 0."
            )
        if "exo_pair" in names and not self.label_smoothing:
            raise ConfigError(
                "method.dpo.loss_type='exo_pair' compares with smoothed labels, so method.dpo.label_smoothing must be "
                "above 0. Its paper uses 1e-3."
            )

    def _check_nll(self, names: list[str]) -> None:
        if self.sft_weight and "sft" in names:
            raise ConfigError(
                f"method.dpo.sft_weight={self.sft_weight} and 'sft' in method.dpo.loss_type={self.loss_type!r} are the "
                "same term twice. Set the former to 0, or leave 'sft' out."
            )
        if self.use_weighting and self.nll_weight:
            raise ConfigError(
                "method.dpo.use_weighting=True weighs pairs, but the negative log-likelihood of method.dpo.sft_weight "
                "or of the loss 'sft' is a mean over tokens. Leave one of them out."
            )

    def _check_divergence(self, names: list[str]) -> None:
        if self.f_divergence_type != "reverse_kl" and (named := _among(names, set(DPO_LOSSES) - set(OF_DIFFERENCES))):
            raise ConfigError(
                f"method.dpo.f_divergence_type={self.f_divergence_type!r} is defined for differences of two answers, "
                f"but method.dpo.loss_type={named} takes each answer by itself. Set the former to 'reverse_kl', or use "
                f"losses out of {', '.join(OF_DIFFERENCES)}."
            )
        if self.f_divergence_type == "alpha_divergence" and self.f_alpha_divergence_coef == 1:
            raise ConfigError(
                "method.dpo.f_alpha_divergence_coef=1.0 makes the divergence the reverse KL divergence: set "
                "method.dpo.f_divergence_type to 'reverse_kl'"
            )
        if self.f_divergence_type != "alpha_divergence" and self.f_alpha_divergence_coef != 0.5:
            raise ConfigError(
                f"method.dpo.f_alpha_divergence_coef={self.f_alpha_divergence_coef} is read only if "
                "method.dpo.f_divergence_type is 'alpha_divergence'. Set it to 0.5."
            )


@dataclass(frozen=True, kw_only=True)
class ORPOConfig(MethodSection):
    """Odds ratio preference optimization: chosen answers are learned, and made more likely than rejected ones."""

    HELD_OUT_METRICS: ClassVar[tuple[str, ...]] = (*PAIR_METRICS, "eval_nll_loss")
    ROWS = "pairs"

    beta: Annotated[
        float, ABOVE_ZERO, "factor of the log-odds-ratio term; the lambda of its paper (arXiv:2403.07691)"
    ] = 0.1
    nll_on_prompt: Annotated[
        bool,
        "take the negative log-likelihood of chosen answers on the tokens of their prompts too, as TRL does; its paper "
        "takes it on answers",
    ] = False


@dataclass(frozen=True, kw_only=True)
class CPOConfig(MethodSection):
    """Contrastive preference optimization: pairs of answers without a reference model, and a loss on chosen answers."""

    HELD_OUT_METRICS = PAIR_METRICS
    ROWS = "pairs"

    beta: Annotated[float, ABOVE_ZERO, "factor of the difference of log-probabilities (arXiv:2401.08417)"] = 0.1
    loss_type: Annotated[
        Literal["sigmoid", "hinge", "ipo"],
        "the loss of a pair; `sigmoid` and `hinge` on log-probabilities of answers, `ipo` on their means over tokens",
    ] = "sigmoid"
    label_smoothing: Annotated[
        float, BELOW_HALF, "probability that the labels of a pair are swapped, for `sigmoid`"
    ] = 0.0
    cpo_alpha: Annotated[
        float, NOT_NEGATIVE, "factor of the mean negative log-likelihood of the tokens of chosen answers"
    ] = 1.0

    def check(self) -> None:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ConfigError(
                f"method.cpo.label_smoothing={self.label_smoothing} is read only if method.cpo.loss_type is 'sigmoid', "
                f"but it is {self.loss_type!r}. Set it to 0."
            )


@dataclass(frozen=True, kw_only=True)
class SimPOConfig(MethodSection):
    """Simple preference optimization: mean log-probabilities of two answers, at least a margin apart; no reference."""

    HELD_OUT_METRICS = PAIR_METRICS
    ROWS = "pairs"

    beta: Annotated[
        float, ABOVE_ZERO, "factor of the difference of mean log-probabilities; its paper uses 2.0 to 2.5"
    ] = 2.0
    gamma: Annotated[
        float,
        NOT_NEGATIVE,
        "the target margin: beta times the difference should exceed it (arXiv:2405.14734); TRL's `simpo_gamma`",
    ] = 0.5
    label_smoothing: Annotated[float, BELOW_HALF, "probability that the labels of a pair are swapped"] = 0.0


@dataclass(frozen=True, kw_only=True)
class KTOConfig(ReferenceSection):
    """Kahneman-Tversky optimization: single answers, each labelled good or bad, against a frozen reference model."""

    HELD_OUT_METRICS = ("eval_loss", "eval_rewards/margins")
    ROWS = "labelled"

    loss_type: Annotated[
        Literal["kto", "apo_zero_unpaired"],
        "`kto`: against an estimate of the KL divergence from the reference (arXiv:2402.01306); `apo_zero_unpaired`: "
        "without it, for answers that are better than the model's own (arXiv:2408.06266)",
    ] = "kto"
    beta: Annotated[
        float, ABOVE_ZERO, "strength of the tie to the reference model: larger values keep the model closer to it"
    ] = 0.1
    desirable_weight: Annotated[float, ABOVE_ZERO, "factor of the losses of answers that are labelled good"] = 1.0
    undesirable_weight: Annotated[float, ABOVE_ZERO, "factor of the losses of answers that are labelled bad"] = 1.0


def _among(names: Iterable[str], some: Iterable[str]) -> str:
    """Those names that are among some, for a message; empty if there are none."""
    return " and ".join(repr(name) for name in names if name in some)


def _number(key: str, text: str, part: str) -> float:
    try:
        number = float(part)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"{key}={text!r}: {part!r} is not a number above zero, such as 0.5")
    return number
