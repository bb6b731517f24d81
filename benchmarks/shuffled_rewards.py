r"""The control of a run that learns from rewards: the same rewards, given to the wrong answers. It must not learn.

    jaxft train --config=configs/smollm2_135m_grpo.py --config.rewards.functions=benchmarks/shuffled_rewards.py:fields \
      --config.rewards.workers=1
"""

import importlib.util
import random
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "configs" / "reward_functions" / "json_fields.py"


def _json_fields() -> Any:
    spec = importlib.util.spec_from_file_location("json_fields", PATH)
    if spec is None or spec.loader is None:
        raise ImportError(f"{PATH} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fields(completions: list[str], reference: list[str], **columns: Any) -> list[float]:
    """The rewards of `json_fields.fields` in an order that the answers seed, so that a run can be resumed."""
    rewards = _json_fields().fields(completions, reference, **columns)
    random.Random("".join(completions)).shuffle(rewards)
    return rewards
