"""Small configs for tests: as nested mappings and as text of a config file."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.py"))
BODY = """
from jaxft.config import default_config

def get_config(arg=None):
    config = default_config()
    config.model.path = "model"
    config.data.train = "train.jsonl"
    {line}
    return config
"""
GOOD = {"model": {"path": "model"}, "data": {"train": "train.jsonl"}}


def with_fields(fields):
    nested = json.loads(json.dumps(GOOD))
    for key, value in fields.items():
        *sections, name = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return nested
