"""Watches a run that learns from rewards for the ways in which it goes wrong while its loss looks well."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ALIKE_STEPS = 20  # logged steps in a row without a group whose rewards differ
WINDOW = 10  # logged values whose means are compared, the first of a run with the last
COLLAPSED = 0.1  # share of the first entropy below which the policy has collapsed
GROWN = 2.0  # times the first length above which answers have run away


class RewardWatch:
    """Says once of each of these that it happens:

    For ALIKE_STEPS logged steps the rewards of every group are alike. The mean entropy of WINDOW steps is below
    COLLAPSED times that of the first WINDOW. The mean length of answers is above GROWN times that of the first. The
    held-out reward falls at two evaluations in a row, while the reward in training rises between them.
    """

    def __init__(self) -> None:
        self._alike = 0
        self._entropies: list[float] = []
        self._lengths: list[float] = []
        self._rewards: list[float] = []  # since the last evaluation
        self._evaluations: list[tuple[float, float]] = []  # held-out reward, mean reward in training before it
        self._told: set[str] = set()

    def add(self, metrics: Mapping[str, Any]) -> str | None:
        """Adds a logged step or evaluation. The warnings that are new, None if there are none."""
        # The rows of a run folder may hold anything.
        numbers = {name: float(x) for name, x in metrics.items() if isinstance(x, int | float)}
        if "eval_reward" in numbers:
            self._evaluate(numbers["eval_reward"])
        elif "reward" in numbers:
            self._append(numbers)
        new = {name: text for name, text in self._warnings().items() if name not in self._told}
        self._told |= set(new)
        return " ".join(new.values()) or None

    @classmethod
    def warning_of(cls, rows: Iterable[Mapping[str, Any]]) -> str | None:
        """All warnings of a whole run, whose logged rows are these; None if there are none."""
        run = cls()
        return " ".join(warning for row in rows if (warning := run.add(row)) is not None) or None

    def _append(self, metrics: Mapping[str, float]) -> None:
        self._rewards.append(metrics["reward"])
        self._alike = self._alike + 1 if metrics.get("frac_reward_zero_std") == 1 else 0
        if "completions/mean_length" in metrics:
            self._lengths.append(metrics["completions/mean_length"])
        if metrics.get("entropy"):  # 0 is logged for a step that was skipped
            self._entropies.append(metrics["entropy"])

    def _evaluate(self, reward: float) -> None:
        mean = statistics.fmean(self._rewards) if self._rewards else float("nan")
        self._evaluations.append((reward, mean))
        self._rewards = []

    def _warnings(self) -> dict[str, str]:
        out = {}
        if self._alike >= ALIKE_STEPS:
            out["alike"] = (
                f"for {ALIKE_STEPS} logged steps the rewards of every group have been alike, so that nothing is "
                "learned: the task is too hard or too easy for the model, or the reward does not tell its answers "
                "apart. Look into completions.jsonl."
            )
        if (entropies := _ends(self._entropies)) and entropies[1] < COLLAPSED * entropies[0]:
            out["entropy"] = (
                f"the entropy of the policy fell from {entropies[0]:.3g} to {entropies[1]:.3g} nats a token, so that "
                "the answers to a prompt hardly differ any more. Lower optim.learning_rate, raise "
                "rollout.temperature, or set an entropy bonus or a reference (beta)."
            )
        if (lengths := _ends(self._lengths)) and lengths[1] > GROWN * lengths[0]:
            out["length"] = (
                f"answers grew from {lengths[0]:.0f} to {lengths[1]:.0f} tokens on average: the reward may favour "
                "length. Look into completions.jsonl, or add a reward for brevity."
            )
        if self._falls_while_reward_rises():
            before, _, after = self._evaluations[-3:]
            out["held out"] = (
                f"the held-out reward fell from {before[0]:.4g} to {after[0]:.4g} in two evaluations, while the reward "
                f"in training rose to {after[1]:.4g}: the model learns the training prompts, or a weakness of the "
                "reward that greedy answers do not share. Stop earlier, or set a reference (beta)."
            )
        return out

    def _falls_while_reward_rises(self) -> bool:
        if len(self._evaluations) < 3:
            return False
        (first, _), (second, before), (third, after) = self._evaluations[-3:]
        return first > second > third and after > before


def _ends(values: Sequence[float]) -> tuple[float, float] | None:
    """(mean of the first WINDOW values, mean of the last); None if the windows would overlap."""
    if len(values) < 2 * WINDOW:
        return None
    return statistics.fmean(values[:WINDOW]), statistics.fmean(values[-WINDOW:])
