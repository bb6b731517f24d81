"""A game: the model finds a secret whole number, and is told after each guess whether it is higher or lower."""

import math
import random
import re
from collections.abc import Mapping
from typing import Any

from jaxft.rollouts.environments.messages import with_instructions, without_thoughts

WHOLE = re.compile(r"-?\d+")
LONGEST = 20  # digits of a guess that is read


class GuessNumber:
    """The `Environment`. Rows may have `low` and `high`, 1 and 100 if they have not, and the number as `secret`.

    Without a `secret` it is drawn with the row's `index` as the seed. The reward is 0 if the number was not found, 1 if
    it was found in as many guesses as halving the range needs at most, and falls towards 0.5 with each further one.
    """

    def reset(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The prompt of the row with the rules. Raises ValueError for a range without a number, or a secret beyond it.

        Source of the number of guesses that halving needs: it splits n numbers into a tree of depth ceil(log2(n + 1)).
        """
        self._low, self._high = int(row.get("low", 1)), int(row.get("high", 100))
        if self._low > self._high:
            raise ValueError(f"low={self._low} is above high={self._high}")
        drawn = random.Random(int(row["index"])).randint(self._low, self._high)
        self._secret = int(row.get("secret", drawn))
        if not self._low <= self._secret <= self._high:
            raise ValueError(f"secret={self._secret} is not between low={self._low} and high={self._high}")
        self._turns, self._success = 0, False
        rules = (
            f"I have chosen a whole number from {self._low} to {self._high}. Guess it: answer with one number. I tell "
            "you whether mine is higher or lower."
        )
        return with_instructions(row["prompt"], rules)

    def step(self, completion: str) -> list[dict[str, Any]]:
        """Whether the secret is higher or lower than the last number of the turn; nothing once it is right."""
        self._turns += 1
        numbers = WHOLE.findall(without_thoughts(completion))
        if not numbers or len(numbers[-1]) > LONGEST:
            return [{"role": "user", "content": f"Answer with a whole number from {self._low} to {self._high}."}]
        guess = int(numbers[-1])
        self._success = guess == self._secret
        if self._success:
            return []
        return [{"role": "user", "content": f"My number is {'higher' if guess < self._secret else 'lower'}."}]

    def reward(self) -> float:
        """From 0.5 to 1 by the number of turns if the number was found, else 0."""
        if not self._success:
            return 0.0
        needed = math.ceil(math.log2(self._high - self._low + 2))
        return 0.5 + 0.5 * min(1.0, needed / self._turns)
