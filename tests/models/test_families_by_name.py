"""Model types that are other names of a family."""

import json

from jaxft import models
from jaxft.assets import ASSETS


def test_kimi_k2_is_a_deepseek_v3():
    hf = json.loads((ASSETS / "published" / "kimi-k2.json").read_text(encoding="utf-8"))
    assert models.config_from_hf(hf | {"model_type": "kimi_k2"}) == models.config_from_hf(hf)
