"""The method section: which training method, and one section with the settings of each."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from jaxft.config.fields import (
    ABOVE_ZERO,
    BELOW_ONE,
    BY_CONTENT,
    CHOOSES_SECTION,
    NOT_NEGATIVE,
    PATH,
    ZERO_TO_ONE,
    ReadBy,
    Section,
)
from jaxft.config.method_section import MethodSection
from jaxft.config.policy import GRPOConfig, OnlineDPOConfig, PPOConfig, RLOOConfig
from jaxft.config.preference import CPOConfig, DPOConfig, KTOConfig, ORPOConfig, SimPOConfig
from jaxft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SFTConfig(MethodSection):
    """Supervised fine-tuning: the cross-entropy of the trained tokens, and what may be added to it."""

    HELD_OUT_METRICS = ("eval_loss", "eval_perplexity", "eval_mean_token_accuracy")

    loss_type: Annotated[
        Literal["nll", "dft"],
        "loss of a target of probability p. `nll`: -log p; `dft`: -p log p, without a gradient through the factor p "
        "(arXiv:2508.05629)",
    ] = "nll"
    label_smoothing_factor: Annotated[
        float, BELOW_ONE, "share of each target's weight that is spread evenly over the vocabulary"
    ] = 0.0
    z_loss: Annotated[
        float,
        NOT_NEGATIVE,
        "coefficient of log(Z)^2, where Z normalizes the softmax; PaLM (arXiv:2204.02311) uses 1e-4",
    ] = 0.0
    neftune_noise_alpha: Annotated[
        float | None,
        ABOVE_ZERO,
        "size of the noise on token embeddings in training; arXiv:2310.05914 uses 5 to 15; None: no noise",
    ] = None

    def check(self) -> None:
        if self.loss_type == "dft" and self.label_smoothing_factor:
            raise ConfigError(
                "method.sft.loss_type='dft' weighs each target by its own probability, and a smoothed target has none: "
                f"set method.sft.label_smoothing_factor={self.label_smoothing_factor} to 0"
            )


@dataclass(frozen=True, kw_only=True)
class RewardConfig(MethodSection):
    """Reward models: a score head learns from pairs which of two answers people prefer."""

    HELD_OUT_METRICS = ("eval_loss", "eval_accuracy", "eval_margin")
    ROWS = "pairs"

    center_rewards_coefficient: Annotated[
        float | None,
        ABOVE_ZERO,
        "coefficient of the squared sum of a pair's two scores, which keeps scores near 0 (arXiv:2312.09244); TRL "
        "recommends 0.01; None: scores may drift",
    ] = None
    margin_coefficient: Annotated[
        float | None,
        NOT_NEGATIVE,
        "factor of the rows' margins in the loss, in whose units scores are learned; TRL uses 1; 0: margins are not "
        "used; None: rows with margins are refused",
    ] = None


@dataclass(frozen=True, kw_only=True)
class DistillConfig(MethodSection):
    """Distillation on given data: the model learns a teacher's distributions over the next token."""

    HELD_OUT_METRICS = (
        "eval_loss", "eval_divergence", "eval_nll", "eval_mean_token_accuracy", "eval_teacher_agreement",
    )  # fmt: skip

    teacher: Annotated[
        str | None,
        BY_CONTENT,
        PATH,
        "the teacher, named like `model.path`; required. Its vocabulary must be that of the trained model",
    ] = None
    teacher_revision: Annotated[str | None, BY_CONTENT, "branch, tag or commit of a `hf://` teacher"] = None
    teacher_random_init: Annotated[
        bool, "take only the shapes from `teacher`, and draw its weights instead of loading them: for tests"
    ] = False
    teacher_quantization: Annotated[
        Literal["nf4", "nf4-dq", "int8", "int4"] | None,
        "format to which the teacher's linear layers are quantized while loading",
    ] = None
    beta: Annotated[
        float,
        ZERO_TO_ONE,
        "the divergence (arXiv:2306.13649, eq. 1). 0: KL(teacher, student), forward; 1: KL(student, teacher), "
        "reverse; between: generalised Jensen-Shannon",
    ] = 0.5
    temperature: Annotated[
        float,
        ABOVE_ZERO,
        "divides the logits of both models in the divergence, and those that answers are sampled from",
    ] = 1.0
    sft_weight: Annotated[
        float, BELOW_ONE, "share of the cross-entropy of the data's own tokens in the loss; the rest is the divergence"
    ] = 0.0
    lmbda: Annotated[
        float,
        ZERO_TO_ONE,
        "share of the steps that train on answers which the model samples to the prompts of the rows, instead of the "
        "answers of the rows (on-policy distillation, arXiv:2306.13649)",
    ] = 0.0
    max_new_tokens: Annotated[
        int,
        ABOVE_ZERO,
        ReadBy("method.distill.lmbda", because="Otherwise no answers are sampled."),
        "length at which a sampled answer is cut off, in tokens",
    ] = 128
    cache_top_k: Annotated[
        int | None,
        ABOVE_ZERO,
        "compute this many log-probabilities of the teacher at every trained token once, before the first step, and "
        "then free the teacher; None: the teacher runs in every step",
    ] = None


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Section):
    """The training method. Settings of one method are in the section of its name."""

    name: Annotated[
        Literal["sft", "dpo", "orpo", "cpo", "simpo", "kto", "reward", "distill", "grpo", "rloo", "online_dpo", "ppo"],
        CHOOSES_SECTION,
        "the training method; `sft`: supervised fine-tuning; `dpo`, `orpo`, `cpo` and `simpo`: learning from pairs of "
        "answers; `kto`: learning from answers labelled good or bad; `reward`: a reward model; `distill`: "
        "learning the distributions of a larger model; `grpo`, `rloo`, `online_dpo` and `ppo`: learning from rewards "
        "of answers that the model samples; see [preferences](preferences.md), "
        "[reward models](reward_models.md), [distillation](distillation.md) and [rewards](rewards.md)",
    ] = "sft"
    sft: SFTConfig = field(default_factory=SFTConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    orpo: ORPOConfig = field(default_factory=ORPOConfig)
    cpo: CPOConfig = field(default_factory=CPOConfig)
    simpo: SimPOConfig = field(default_factory=SimPOConfig)
    kto: KTOConfig = field(default_factory=KTOConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    rloo: RLOOConfig = field(default_factory=RLOOConfig)
    online_dpo: OnlineDPOConfig = field(default_factory=OnlineDPOConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)

    @property
    def chosen(self) -> MethodSection:
        """The section of the chosen method."""
        return getattr(self, self.name)


def methods_on(rows: str) -> tuple[str, ...]:
    """The names of the methods whose rows have this form, as their section's ROWS says."""
    sections = {spec.name: spec.type for spec in fields(MethodConfig)}
    return tuple(
        name
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, MethodSection) and section.ROWS == rows
    )
