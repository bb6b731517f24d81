"""The batches of a run: of one set, or of a mixture, and what they hold of each set before a step is taken."""

from typing import Any

from rich.console import Console
from rich.table import Table

from jaxft.config import RunConfig
from jaxft.data import Prepared, Tokenizer
from jaxft.data.batch_source import BatchSource
from jaxft.data.loader import Loader
from jaxft.data.mixture import Mixture, Share


def make_loader(examples: Any, config: RunConfig, tokenizer: Tokenizer, *, shuffle: bool) -> Loader:
    """Batches of the run's size over the examples of one set."""
    return Loader(
        examples,
        batch_size=config.train.batch_size,
        max_length=config.data.max_length,
        packing=config.data.packing,
        shuffle=shuffle,
        seed=config.seed,
        pad_id=tokenizer.pad_id,
    )


def training_batches(data: Prepared, config: RunConfig, tokenizer: Tokenizer) -> tuple[BatchSource, int]:
    """What gives the batch of every step, and how many steps the run has.

    Raises DataError where a set of a mixture would be seen more often than its max_epochs.
    """
    train = config.train
    if not config.data.mixture:
        loader = make_loader(data.train_examples, config, tokenizer, shuffle=config.data.shuffle)
        return loader, train.steps or loader.steps_for(train.epochs)
    mixture = Mixture(
        data.sets,
        config.data,
        batch_size=train.batch_size,
        seed=config.seed,
        pad_id=tokenizer.pad_id,
        epochs=train.epochs,
        steps=train.steps,
    )
    mixture.check_epochs()
    return mixture, mixture.total_steps


def described(data: Prepared, batches: BatchSource) -> dict[str, Any]:
    """What data.json and --json say of a run's data. Of a mixture, `mixture` says in words what the run takes of each
    set, `sets` holds their examinations and `stages` the counts of every stage."""
    found = data.examination.to_dict()
    if isinstance(batches, Mixture):
        whole = batches.shares(0, batches.total_steps)
        found["mixture"] = {share.name: _said(share) for share in whole}
        found["sets"] = [{"name": one.name, **one.examination.to_dict()} for one in data.sets]
        found["stages"] = [
            {"steps": [start, end], "sets": [_figures(share) for share in batches.shares(start, end)]}
            for start, end, _ in batches.stages()
        ]
        found["warnings"] = [*found["warnings"], *_unseen(whole)]
    if data.eval_examination is not None:
        found["eval"] = data.eval_examination.to_dict()
    return found


def print_mixture(batches: BatchSource, console: Console) -> None:
    """A table of what a run takes of each set, by stage and as a whole; nothing where there is one set."""
    if not isinstance(batches, Mixture):
        return
    table = Table(
        "steps", "set", "weight", "rows", "sequences", "epochs", "tokens", "trained", box=None, pad_edge=False
    )
    stages = batches.stages()
    spans = stages if len(stages) == 1 else [*stages, (0, batches.total_steps, {})]
    for start, end, weights in spans:
        total = sum(weights.values())
        for share in batches.shares(start, end):
            weight = f"{weights.get(share.name, 0.0) / total:.1%}" if total else ""
            steps = f"{start + 1:,}-{end:,}" if weights else "all"
            table.add_row(
                steps, share.name, weight, f"{share.rows:,}", f"{share.sequences:,}",
                f"{share.epochs:.2f}", f"{share.token_share:.1%}", f"{share.trained_share:.1%}",
            )  # fmt: skip
    console.print("\nwhat training takes of each set (weights are shares of tokens):", highlight=False)
    console.print(table)
    for warning in _unseen(batches.shares(0, batches.total_steps)):
        console.print(f"warning: {warning}", style="yellow", highlight=False)


def _unseen(shares: list[Share]) -> list[str]:
    return [
        f"the set {share.name!r} is never seen in so few steps: raise train.steps, or its weight"
        for share in shares
        if not share.sequences
    ]


def _said(share: Share) -> str:
    return (
        f"{share.rows:,} rows in {share.sequences:,} sequences, {share.epochs:.2f} epochs, {share.token_share:.1%} of "
        f"tokens, {share.trained_share:.1%} of trained tokens"
    )


def _figures(share: Share) -> dict[str, Any]:
    return {name: getattr(share, name) for name in share.__dataclass_fields__}
