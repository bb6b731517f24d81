"""How the answers to the same held-out prompts changed while a model learned from rewards."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.runs.report.files import Row, is_number

PROMPTS_SHOWN = 6
EVALUATIONS_SHOWN = 5


def changing_answers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The prompt and the answers, oldest first, of the first held-out prompts; each answer has its step and rewards.

    rows: of `held_out_completions.jsonl`. Of many evaluations, the first, the last and some between are shown.
    """
    steps = _choose_steps(sorted({row["step"] for row in rows}))
    prompts: dict[Any, dict[str, Any]] = {}
    for row in rows:
        if row["step"] not in steps:
            continue
        known = prompts.setdefault(row.get("group"), {"prompt": prompt_text(row.get("prompt")), "answers": []})
        known["answers"].append({"step": row["step"], "text": _answer_text(row), "rewards": _rewards(row)})
    return list(prompts.values())[:PROMPTS_SHOWN]


def _answer_text(row: Row) -> str:
    """The answer; of a conversation with an environment, all of its turns and the replies to them."""
    parts = row.get("conversation")
    if isinstance(parts, list) and all(isinstance(part, Mapping) for part in parts):
        return "".join(str(part.get("text") or "") for part in parts)
    return str(row.get("completion") or "")


def prompt_text(prompt: Any) -> str:
    """A prompt as people read it: text as it is, messages each after its role."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(message, Mapping) for message in prompt):
        if len(prompt) == 1:
            return str(prompt[0].get("content"))
        return "\n\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)
    return json.dumps(prompt, ensure_ascii=False)


def _rewards(row: Row) -> str:
    """`reward 0.80`; the parts are added if there are several functions."""
    if not is_number(row.get("reward")):
        return "not scored"
    by_function = row.get("rewards")
    named = by_function if isinstance(by_function, Mapping) else {}
    parts = [f"{name} {value:.2f}" for name, value in named.items() if is_number(value)]
    return f"reward {row['reward']:.2f}" + (f" ({', '.join(parts)})" if len(named) > 1 else "")


def _choose_steps(steps: Sequence[int]) -> set[int]:
    if len(steps) <= EVALUATIONS_SHOWN:
        return set(steps)
    last = EVALUATIONS_SHOWN - 1
    return {steps[round(number * (len(steps) - 1) / last)] for number in range(EVALUATIONS_SHOWN)}
