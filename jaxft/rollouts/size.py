"""How much a rollout samples, as far as the config determines it, for `jaxft plan`."""

from dataclasses import dataclass

from jaxft.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class RolloutSize:
    """What is sampled at once, and what it serves.

    prompts: that are answered. group: answers to each of them. max_completion_length: tokens of an answer, at most.
    prompt_length: tokens of a prompt, at most. length: tokens for which a row of the cache has room. slots: most
    answers that are decoded at the same time. slots_field, length_field: the config fields of the slots and of the
    length of answers. updates: optimizer steps from one rollout to the next, on average. batches: of the optimizer
    step's size, into which the answers are packed. scoring_passes: forward passes over each of these batches before the
    first update, of the policy or of its reference. keep_slots: whether there are `slots` slots even for fewer answers,
    as with an environment.
    """

    prompts: int
    group: int
    max_completion_length: int
    prompt_length: int
    length: int
    slots: int
    slots_field: str = "rollout.slots"
    length_field: str = "rollout.max_completion_length"
    updates: float
    batches: int = 1
    scoring_passes: int = 0
    keep_slots: bool = False

    @property
    def answers(self) -> int:
        """Answers to all prompts."""
        return self.prompts * self.group


def rollout_size(
    config: RunConfig, *, scoring_passes: int | None = None, answers_of_sequence: int = 1
) -> RolloutSize | None:
    """The size of the rollouts of the section `rollout`; None if the rows of the method are no prompts.

    scoring_passes: by default one, of the policy, if answers serve more than one update. answers_of_sequence: so many
    prompts and answers must fit into a sequence of `data.max_length`.
    """
    rollout = config.rollout
    if config.method.chosen.ROWS != "prompts":
        return None
    passes = int(rollout.updates > 1) if scoring_passes is None else scoring_passes
    return RolloutSize(
        prompts=config.train.batch_size * rollout.steps_per_rollout // rollout.num_generations,
        group=rollout.num_generations,
        max_completion_length=rollout.max_completion_length,
        prompt_length=config.data.max_length // answers_of_sequence - rollout.max_completion_length,
        length=config.data.max_length,
        slots=rollout.slots,
        updates=rollout.updates,
        batches=rollout.steps_per_rollout,
        scoring_passes=passes,
        keep_slots=rollout.environment is not None,
    )
