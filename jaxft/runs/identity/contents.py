"""The identity of a run: the contents of all that it reads, whatever the paths are called.

Two runs with the same settings that read the same contents compute the same. A path of another spelling, or a file that
was moved, makes no difference; a file that was changed makes another run.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.checkpoint.load import resolve, resolve_base
from jaxft.config import RunConfig
from jaxft.data import Prepared, Tokenizer
from jaxft.data.batch import Example
from jaxft.data.encoded.table import ExampleTable, end_to_end
from jaxft.data.prompts import Prompt
from jaxft.files.digest import content_digest
from jaxft.files.paths import is_file
from jaxft.files.weights_digest import PEFT_CONFIG, weights_digest
from jaxft.methods import method_of
from jaxft.rollouts.environments.named import named_environment
from jaxft.rollouts.reward_functions.named import Named, named_functions

HELD_OUT = "data.eval"
TOKENIZER = "tokenizer"
BLOCK = 4096  # examples that are hashed at a time

# What a run reads, by the field that names it or TOKENIZER: `path` as it is spelt, `digest`, and for rows `examples`
# and `tokens`.
Reads = dict[str, dict[str, Any]]


def reads_of(config: RunConfig, tokenizer: Tokenizer, data: Prepared | None = None) -> Reads:
    """What a run reads. data: None if rows are given from outside.

    The digest of rows is that of the tokens, masks and numbers that training sees, after reading, rendering and
    tokenising, so that it does not depend on the form of the file. Raises CheckpointError for a file that is not there.
    """
    reads: Reads = {
        "model.path": base_read(config),
        TOKENIZER: {"path": config.model.path, "digest": _tokenizer_digest(tokenizer)},
    }
    for one in data.sets if data else ():
        key, path = ("data.train", config.data.train)
        if config.data.mixture:
            key, path = f"data.mixture.{one.name}.path", config.data.mixture[one.name].path
        reads[key] = {"path": path, **rows_read(one.examples)}
    if data and data.eval_examples is not None:
        reads[HELD_OUT] = {"path": config.data.eval or config.data.train, **rows_read(data.eval_examples)}
    if (frozen := method_of(config).frozen(config)) is not None:
        digest = _model_digest(frozen.path, frozen.revision, drawn=frozen.random_seed is not None)
        reads[frozen.setting] = {"path": frozen.path, "digest": digest}
    if (functions := config.rewards.functions) is not None:
        reads["rewards.functions"] = {"path": functions, "digest": code_digest(named_functions(functions))}
    if (environment := config.rollout.environment) is not None:
        reads["rollout.environment"] = {"path": environment, "digest": code_digest([named_environment(environment)])}
    return reads


def base_read(config: RunConfig) -> dict[str, Any]:
    """The path and the digest of the model that a run trains."""
    model = config.model
    digest = _model_digest(model.path, model.revision, drawn=model.random_init, base=model.base)
    return {"path": model.path, "digest": digest}


def other_reads(before: Mapping[str, Mapping[str, Any]], now: Reads) -> list[str]:
    """What differs in content among all that a run reads, in words; the held-out rows, which may change, are left out.

    before: as recorded; {} if nothing was.
    """
    out = []
    for key in sorted({**before, **now}) if before else ():
        old, new = before.get(key), now.get(key)
        if key == HELD_OUT or (old and new and old["digest"] == new["digest"]):
            continue
        if not old or not new:
            out.append(f"{key}: was {old and old['path']!r}, now {new and new['path']!r}")
            continue
        counts = ""
        if "tokens" in old and "tokens" in new:
            counts = " (" + ", ".join(
                f"{word} {one['examples']:,} examples of {one['tokens']:,} tokens"
                for word, one in (("was", old), ("now", new))
            ) + ")"  # fmt: skip
        path = repr(new["path"]) + (f", before {old['path']!r}," if old["path"] != new["path"] else "")
        what = "the rows, or how they become tokens," if "tokens" in new else "the content"
        out.append(f"{key}: {what} of {path} changed{counts}")
    return out


def _model_digest(path: str, revision: str | None, *, drawn: bool, base: str | None = None) -> str:
    folder = resolve(path, revision)
    digest = weights_digest(folder, weights=not drawn)
    if not folder.endswith(".gguf") and is_file(f"{folder}/{PEFT_CONFIG}"):
        digest = hashlib.sha256(
            f"{digest} {_model_digest(resolve_base(folder, base), None, drawn=False)}".encode()
        ).hexdigest()
    return digest


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Of its tokens and their roles, and of further chat templates; the one of rows is compared by itself."""
    roles = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *sorted(tokenizer.stop_ids)]
    others = {name: text for name, text in tokenizer.chat_templates.items() if name != "default"}
    return _digest([sorted(tokenizer.backend.get_vocab().items()), roles, others])


def code_digest(named: Sequence[Named]) -> str:
    """Of the code that is called and of its weights: of a file's content, of a built-in function's name."""
    return _digest(
        [[one.name, one.weight, content_digest(one.source) if is_file(one.source) else one.source] for one in named]
    )


def rows_read(examples: Sequence[Example]) -> dict[str, Any]:
    """The digest and the counts of examples."""
    digest, tokens = hashlib.sha256(), 0
    for start in range(0, len(examples), BLOCK):
        block = examples[start : start + BLOCK]
        lengths, tokens_n, mask_n = end_to_end(block)
        tokens += len(tokens_n)
        digest.update(lengths.tobytes() + tokens_n.tobytes() + mask_n.tobytes())
        for example in () if isinstance(block, ExampleTable) and not block.values else block:
            if example.values:
                digest.update(json.dumps(sorted(example.values.items())).encode())
            if isinstance(example, Prompt):
                digest.update(json.dumps(example.columns, sort_keys=True, default=str).encode())
    return {"digest": digest.hexdigest(), "examples": len(examples), "tokens": tokens}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
