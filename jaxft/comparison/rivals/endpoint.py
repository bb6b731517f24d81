"""A rival that is not here: any server that speaks OpenAI's chat completions, by its address and a key."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxft.comparison.prompts import OWN, SystemPrompt, prompt_messages, prompt_tokens
from jaxft.comparison.rivals.cache import AnswerCache, digest_of
from jaxft.comparison.rivals.local import Answered, Examples
from jaxft.comparison.rivals.speed import ALONE, MEASURED
from jaxft.comparison.rows import Row
from jaxft.config import RunConfig
from jaxft.data import Tokenizer
from jaxft.data.chat.reasoning import split_thoughts
from jaxft.errors import ConfigError, DataError
from jaxft.runs.scores.answers import AnsweredRow

BASE_URL, API_KEY = "JAXFT_COMPARE_BASE_URL", "JAXFT_COMPARE_API_KEY"
TRIES, TIMEOUT_SECONDS, MOST_BYTES = 4, 120.0, 8 * 2**20
AT_ONCE = 4  # requests side by side
AGAIN = (408, 409, 429, 500, 502, 503, 504)  # answers after which the same request may succeed
MOST_WAIT = 60.0


class Endpoint:
    """A model behind `POST BASE_URL/chat/completions`, asked greedily (temperature 0) with the rows' own messages.

    The address is in the environment as JAXFT_COMPARE_BASE_URL, such as https://host/v1, and the key, if it wants one,
    as JAXFT_COMPARE_API_KEY. Neither is written anywhere. tokenizer: of the compared base, for the references, which
    are the same for all ways. wait: seconds to sleep. Raises ConfigError without an address.
    """

    kind = "endpoint"

    def __init__(
        self,
        model: str,
        *,
        tokenizer: Tokenizer,
        config: RunConfig,
        cache: AnswerCache,
        between: Callable[[], None] = lambda: None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = model
        address = os.environ.get(BASE_URL, "").rstrip("/")
        if not address.startswith(("http://", "https://")):
            raise ConfigError(
                f"--endpoint={model} needs an address: set {BASE_URL} in the environment, such as https://host/v1, and "
                f"{API_KEY} if the server wants a key"
            )
        self._url, self._key = f"{address}/chat/completions", os.environ.get(API_KEY)
        self._tokenizer, self._eval, self._cache = tokenizer, config.eval, cache
        self._between, self._wait = between, wait

    def answer(self, rows: Sequence[Row], examples: Examples, system: SystemPrompt = OWN) -> Answered:
        """The answers to rows after examples, from the cache where they are there; saved after every few."""
        references = [prompt_tokens(self._tokenizer, row, (), system)[1] for row in rows]
        prompts = [prompt_messages(self._tokenizer, row, examples(row), system) for row in rows]
        key = digest_of(self._url, self.name, prompts, self._eval.max_new_tokens)
        done = self._cache.kept(key)[: len(prompts)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            while len(done) < len(prompts):
                self._between()
                done += pool.map(self._ask, prompts[len(done) : len(done) + AT_ONCE * 4])
                self._cache.write(key, done)
        return Answered(rows=tuple(done), references=tuple(references), key=key)

    def room(self, rows: Sequence[Row], examples: Examples, k: int, system: SystemPrompt = OWN) -> str | None:
        """None: the server says itself what does not fit."""
        return None

    def speed(self, rows: Sequence[Row], examples: Examples, system: SystemPrompt = OWN) -> dict[str, Any]:
        """The median seconds of the first requests one at a time; the network is in them. It has no device time."""
        prompts = [prompt_messages(self._tokenizer, row, examples(row), system) for row in rows[:MEASURED]]
        name = f"speed-{digest_of(self._url, self.name, prompts, self._eval.max_new_tokens)}"
        if kept := self._cache.value(name):
            return kept
        alone = sorted(self._ask(prompt).seconds for prompt in prompts[:ALONE])
        measured = {"seconds_alone": alone[len(alone) // 2]}
        self._cache.keep_value(name, measured)
        return measured

    def _ask(self, messages: list[dict[str, Any]]) -> AnsweredRow:
        body = {
            "model": self.name, "messages": messages, "temperature": 0, "max_tokens": self._eval.max_new_tokens,
        }  # fmt: skip
        began = time.perf_counter()
        answer = self._post(json.dumps(body).encode())
        seconds = time.perf_counter() - began
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            text = choice["message"].get("content") or ""
            return AnsweredRow(
                text=split_thoughts(text)[1],
                prompt_tokens=int(usage.get("prompt_tokens") or 0),
                answer_tokens=int(usage.get("completion_tokens") or 0),
                seconds=round(seconds, 6),
                finish_reason="length" if choice.get("finish_reason") == "length" else "stop",
            )
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"{self.name} answered in another form than OpenAI's chat completions ({str(answer)[:200]!r}): see "
                f"that {BASE_URL} leads to such a server"
            ) from error

    def _post(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                self._wait(min(MOST_WAIT, 2.0**attempt))
            request = urllib.request.Request(self._url, body, headers)
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                    return json.loads(response.read(MOST_BYTES))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(2000).decode(errors='replace')[:300]}"
                if error.code not in AGAIN:
                    break
            except (urllib.error.URLError, OSError, ValueError) as error:
                problem = str(error)
        raise DataError(
            f"{self.name} did not answer: {problem}. What it has answered is kept, and the same command goes on. See "
            f"that {BASE_URL} and {API_KEY} are right and that the prompts fit into the model."
        )
