"""The rollout section: the answers that the model samples while it trains."""

from dataclasses import dataclass
from typing import Annotated

from jaxft.config.fields import ABOVE_ZERO, BY_CONTENT, FREE_TO_CHANGE, PATH, Range, ReadBy, Section
from jaxft.config.method import methods_on

# Replacements of a rollout's prompts have places in an order of their own: this many for each rollout.
MAX_DRAWS = 64
ONLINE = ReadBy("method.name", methods_on("prompts"), because="Only these methods sample answers while they train.")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Section):
    """How answers to the training prompts are sampled from the model that is trained."""

    num_generations: Annotated[
        int,
        ABOVE_ZERO,
        ONLINE,
        "answers to each prompt: a group; at least 2, except for `ppo`, which compares no answers",
    ] = 8
    max_completion_length: Annotated[
        int,
        ABOVE_ZERO,
        ONLINE,
        "length at which an answer is cut off, in tokens; with an environment, of all turns and the replies to them",
    ] = 512
    environment: Annotated[
        str | None,
        BY_CONTENT,
        ONLINE,
        PATH,
        "what replies to the model, so that an answer has several turns: a class as `FILE.py:CLASS`, or a built-in "
        "one: `calculator`, `guess_number`; see [rewards](rewards.md#environments)",
    ] = None
    max_turns: Annotated[
        int,
        ABOVE_ZERO,
        ReadBy("rollout.environment"),
        "turns of the model after which a conversation with an environment ends",
    ] = 8
    temperature: Annotated[
        float,
        ABOVE_ZERO,
        ONLINE,
        "divides the logits, both when answers are sampled and when their log-probabilities are computed",
    ] = 1.0
    steps_per_rollout: Annotated[
        int, ABOVE_ZERO, ONLINE, "optimizer steps that divide the answers of one rollout among them"
    ] = 1
    num_iterations: Annotated[int, ABOVE_ZERO, ONLINE, "times that the answers of a rollout are trained on"] = 1
    max_redraws: Annotated[
        int,
        Range(lambda value: 0 <= value < MAX_DRAWS, f"at least 0 and below {MAX_DRAWS}"),
        ONLINE,
        "times that groups whose rewards are all alike are replaced by groups of other prompts (dynamic sampling, "
        "DAPO, arXiv:2503.14476, section 3.2); 0: they are kept and teach nothing",
    ] = 0
    share_prompts: Annotated[
        bool,
        ONLINE,
        "whether an update computes the prompt of a group once, and not for each of its answers, if that saves a "
        "quarter of its sequences",
    ] = True
    slots: Annotated[
        int, ABOVE_ZERO, FREE_TO_CHANGE, ONLINE, "most answers that are decoded at the same time, over all devices"
    ] = 32
    log_completions: Annotated[
        bool, FREE_TO_CHANGE, ONLINE, "whether every answer is written to `completions.jsonl` in the run folder"
    ] = True

    @property
    def updates(self) -> int:
        """Optimizer steps from one rollout to the next."""
        return self.steps_per_rollout * self.num_iterations
