"""Path rules: which dimension of which array is split over which mesh axis.

A rule's pattern matches the END of a '/'-joined path, segment by segment, so that
`q_proj/kernel` finds the parameter, its gradient and both of Adam's moments. The rule's
PartitionSpec names the LAST dimensions of the array: leading ones (stacked layers) stay whole.
The first rule that matches wins. Scalars and PRNG keys are never split.
"""

import fnmatch
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jax.sharding import PartitionSpec as P

from jaxft.errors import ConfigError, did_you_mean, listed
from jaxft.nn.partition import AXES
from jaxft.quant import kernel_path

BIG = 2**16  # elements; a larger array must be split when fsdp > 1

log = logging.getLogger(__name__)


class Rule(NamedTuple):
    """`(pattern, spec)`; an optional rule may match nothing.

    dims: where given, only arrays of so many dimensions. only_even: passes on what it does not divide.
    slight: what it does not divide stays whole, however many elements it has: it is a small part of what it belongs to.
    """

    pattern: str
    spec: P
    optional: bool = False
    dims: int | None = None
    only_even: bool = False
    slight: bool = False

    def takes(self, path: str, shape: Sequence[int]) -> bool:
        """Whether the rule is for an array, should it divide it."""
        return matches(self.pattern, kernel_path(path)) and self.dims in (None, len(shape))


WEIGHT, TENSOR, BOTH = AXES["weight"], "tensor", AXES["both"]
REST = AXES["expert_weight"]
# The model dimension D is the gathered one wherever a matrix has it: every product of WEIGHT axes that divides D fits
# all layers, whatever V (50257) or the MLP width are. The layers themselves expect their parameters to lie like this
# (`stored` in nn and adapters). All are optional because one tuple serves tied and untied models, LoRA and full
# fine-tuning; a big array that no rule finds is an error.
RULES: tuple[Rule, ...] = (
    # What optimizers keep beside moments that are shaped like their parameters. A scale of each block of 8-bit codes:
    # blocks go along the side that the tensor axis splits (`optim/eight_bit`), which stays whole. [L, D, blocks]
    Rule("mlp/down_proj/kernel/absmax", P("expert", None, REST), optional=True, dims=4, slight=True),
    Rule("mlp/*_proj/kernel/absmax", P("expert", REST, None), optional=True, dims=4, slight=True),
    Rule("lm_head/kernel/absmax", P(None, BOTH), optional=True, slight=True),
    Rule("o_proj/kernel/absmax", P(None, WEIGHT), optional=True, slight=True),
    Rule("down_proj/kernel/absmax", P(None, WEIGHT), optional=True, slight=True),
    Rule("kernel/absmax", P(WEIGHT, None), optional=True, slight=True),
    Rule("absmax", P(BOTH), optional=True, slight=True),
    # Adafactor's means over rows and over columns, [L, D] and [L, out]; APOLLO's projected moments, [L, r, N].
    Rule("row", P(BOTH), optional=True, slight=True),
    Rule("col", P(BOTH), optional=True, slight=True),
    Rule("low", P(BOTH), optional=True, slight=True),
    # Experts have an axis of their own, and are gathered over the others. [L, E, F, D], [L, E, D, F], [L, E, out]
    Rule("mlp/down_proj/kernel", P("expert", TENSOR, REST), optional=True, dims=4),
    Rule("mlp/*_proj/kernel", P("expert", REST, TENSOR), optional=True, dims=4),
    Rule("mlp/*_proj/bias", P("expert", (*REST, TENSOR)), optional=True, dims=3),
    # Magnitudes of 256 scales, each of 64 weights. [L, E, G], [L, G], [L, E], [L]
    Rule("mlp/*_proj/kernel/scales/largest", P("expert", None), optional=True, dims=3, slight=True),
    Rule("kernel/scales/largest", P(), optional=True, slight=True),
    Rule("mlp/*_proj/kernel/scales/mean", P("expert"), optional=True, dims=2),
    Rule("kernel/scales/mean", P(), optional=True),
    Rule("mlp/down_proj/adapter/lora_a*", P("expert", None, TENSOR), optional=True, dims=4),  # [L, E, r, F]
    Rule("mlp/down_proj/adapter/lora_b*", P("expert", None, REST), optional=True, dims=4),  # [L, E, r, D]
    Rule("mlp/*_proj/adapter/lora_a*", P("expert", None, REST), optional=True, dims=4),  # [L, E, r, D]
    Rule("mlp/*_proj/adapter/lora_b*", P("expert", None, TENSOR), optional=True, dims=4),  # [L, E, r, F]
    Rule("router/kernel", P(WEIGHT, None), optional=True),  # [L, D, E]
    Rule("router/bias", P(), optional=True),  # [L, E]
    Rule("embedding", P(TENSOR, WEIGHT), optional=True),  # [V, D]
    # By the vocabulary, as the loss uses it; where that does not divide, like any kernel.
    Rule("lm_head/kernel", P(None, BOTH), optional=True, only_even=True),  # [D, V]
    Rule("o_proj/kernel", P(TENSOR, WEIGHT), optional=True),  # [L, N*H, D]
    Rule("down_proj/kernel", P(TENSOR, WEIGHT), optional=True),  # [L, F, D]
    Rule("kernel", P(WEIGHT, TENSOR), optional=True),  # [L, D, out]
    Rule("lora_embedding_a", P(WEIGHT, None), optional=True),  # [V, r]
    Rule("lora_embedding_b", P(None, WEIGHT), optional=True),  # [r, D]
    # Both halves, and what they began with. r stays whole.
    Rule("lora_[ab]*", P(None, BOTH), optional=True, only_even=True),  # [L, r, in], [L, r, out]
    Rule("lora_[ab]*", P(None, WEIGHT), optional=True),
    Rule("o_proj/adapter/lora_magnitude", P(WEIGHT), optional=True),  # [L, D]
    Rule("down_proj/adapter/lora_magnitude", P(WEIGHT), optional=True),  # [L, D]
    Rule("lora_magnitude", P(BOTH), optional=True),  # [L, out]
    Rule("factors", P(BOTH), optional=True),  # [L, D or out]
    Rule("lambda_b", P(BOTH), optional=True),  # [L, out]
    Rule("lambda_d", P(WEIGHT), optional=True),  # [L, r]
    Rule("shared/a", P(None, WEIGHT), optional=True),  # [r, in]
    Rule("shared/b", P(None, WEIGHT), optional=True),  # [r, out]
    Rule("prompt/embeddings", P(None, WEIGHT), optional=True),  # [n, D]
    Rule("prefix/keys", P(None, BOTH), optional=True),  # [L, n, K*H]
    Rule("prefix/values", P(None, BOTH), optional=True),  # [L, n, K*H]
    Rule("scale", P(WEIGHT), optional=True),  # [L, D]
    Rule("o_proj/bias", P(WEIGHT), optional=True),  # [L, D]
    Rule("down_proj/bias", P(WEIGHT), optional=True),  # [L, D]
    Rule("bias", P(BOTH), optional=True),  # [L, out]
)


def matches(pattern: str, path: str) -> bool:
    """Whether the last segments of path fit the pattern's, each as a shell glob: `layers/*/kernel`."""
    wanted, tail = pattern.split("/"), path.split("/")
    if len(wanted) > len(tail):
        return False
    return all(fnmatch.fnmatchcase(s, w) for w, s in zip(wanted, tail[-len(wanted) :], strict=True))


class Leaf(NamedTuple):
    """What a rule needs to know of one array."""

    path: str
    shape: tuple[int, ...]
    splittable: bool  # False for PRNG keys


def assign(leaves: Sequence[Leaf], rules: Sequence[Rule | tuple[str, P]], axes: Mapping[str, int]) -> list[P]:
    """The PartitionSpec of every leaf.

    axes: mesh axis name -> size.
    Raises ConfigError for a rule that names no mesh axis or is first for no leaf, a big leaf whose
    dimension does not divide by its axes, and, when fsdp > 1, a big leaf left whole on every device.
    Small leaves that do not divide are left whole and logged.
    """
    rules = [Rule(*rule) for rule in rules]
    for rule in rules:
        for axis in (a for entry in tuple(rule.spec) for a in _names(entry)):
            if axis not in axes:
                raise ConfigError(
                    f"sharding rule {rule.pattern!r} names mesh axis {axis!r}; the mesh has {', '.join(axes)}."
                    f"{did_you_mean(axis, axes)}"
                )
    found, used, specs = _Findings(axes), set(), []
    for leaf in leaves:
        index = next((i for i, rule in enumerate(rules) if found.takes(rule, leaf)), None)
        if index is not None:
            used.add(index)
        spec = rules[index].spec if index is not None and leaf.splittable and leaf.shape else P()
        slight = index is not None and rules[index].slight
        specs.append(found.place(leaf, spec, slight=slight))
    _refuse_unused([rule for i, rule in enumerate(rules) if i not in used and not rule.optional], leaves)
    found.report()
    return specs


@dataclass
class _Findings:
    axes: Mapping[str, int]
    misfits: list[str] = field(default_factory=list)
    misfit_dims: list[int] = field(default_factory=list)
    whole: list[Leaf] = field(default_factory=list)
    small: list[str] = field(default_factory=list)

    def takes(self, rule: Rule, leaf: Leaf) -> bool:
        """Whether the rule is for this array."""
        if not rule.takes(leaf.path, leaf.shape):
            return False
        lengths = reversed(leaf.shape)
        uneven = any(
            length % math.prod(self.axes[name] for name in _names(entry))
            for length, entry in zip(lengths, reversed(tuple(rule.spec)), strict=False)
        )
        return not (rule.only_even and uneven)

    def place(self, leaf: Leaf, spec: P, *, slight: bool = False) -> P:
        """The rule's spec moved to the last dimensions; dimensions that do not divide stay whole."""
        big = math.prod(leaf.shape) > BIG and not slight
        entries = tuple(spec)
        if len(entries) > len(leaf.shape):
            self._misfit(leaf, big, f"has {len(leaf.shape)} dimensions, its rule {spec} names {len(entries)}")
            entries = ()
        entries = (None,) * (len(leaf.shape) - len(entries)) + entries
        # Axes of one device split nothing, and specs that differ in them alone would compare unequal.
        entries = tuple(tuple(name for name in _names(entry) if self.axes[name] > 1) or None for entry in entries)
        kept, ways = [], 1
        for axis, (entry, length) in enumerate(zip(entries, leaf.shape, strict=True)):
            count = math.prod(self.axes[name] for name in _names(entry))
            if length == 1:
                entry, count = None, 1  # one scale for all inputs: nothing to split
            elif length % count:
                what = f"{'x'.join(_names(entry))}={count} does not divide dimension {axis} = {length}"
                self._misfit(leaf, big, what, length)
                entry, count = None, 1
                ways = 0 if big else ways  # named once, as a misfit
            kept.append(entry)
            ways *= count
        if ways == 1 and big and math.prod(self.axes.get(axis, 1) for axis in WEIGHT) > 1:
            self.whole.append(leaf)
        while kept and kept[-1] is None:
            kept.pop()  # P() and P(None, None) mean the same but compare unequal
        return P(*kept)

    def _misfit(self, leaf: Leaf, big: bool, what: str, length: int | None = None) -> None:
        text = f"{leaf.path} {list(leaf.shape)}: {what}"
        (self.misfits if big else self.small).append(text)
        if big and length is not None:
            self.misfit_dims.append(length)

    def report(self) -> None:
        if self.misfits:
            devices = math.prod(self.axes.values())
            fits = divisors(devices, lambda d: all(length % d == 0 for length in self.misfit_dims))
            mesh = ", ".join(f"{axis}={size}" for axis, size in self.axes.items() if size > 1)
            raise ConfigError(
                f"the mesh ({mesh}) cannot split these arrays into equal shards:\n{listed(self.misfits, lines=True)}\n"
                f"Set the axis to one of {fits}: they divide these dimensions and the {devices} devices."
            )
        if self.whole:
            lines = [f"{leaf.path} {list(leaf.shape)}: {math.prod(leaf.shape):,} elements" for leaf in self.whole]
            spread = ", ".join(f"{axis}={self.axes[axis]}" for axis in WEIGHT if self.axes[axis] > 1)
            raise ConfigError(
                f"{spread}, but these arrays of more than {BIG:,} elements would be whole on every "
                f"device:\n{listed(lines, lines=True)}\nAdd a sharding rule whose pattern ends like their paths."
            )
        if self.small:
            log.warning("left whole on every device, being small:\n%s", listed(self.small, lines=True))


def divisors(number: int, wanted: Callable[[int], bool] = lambda d: True) -> str:
    """`1, 2, 4, 8`: the divisors of a number that fulfil a condition."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0 and wanted(d))


def _refuse_unused(unused: Sequence[Rule], leaves: Sequence[Leaf]) -> None:
    if not unused:
        return
    lines = []
    for rule in unused:
        depth = rule.pattern.count("/") + 1
        near = did_you_mean(rule.pattern, {"/".join(leaf.path.split("/")[-depth:]) for leaf in leaves})
        shadowed = any(rule.takes(leaf.path, leaf.shape) for leaf in leaves)
        why = "an earlier rule takes all that it matches" if shadowed else f"matches no array.{near}"
        lines.append(f"{rule.pattern!r}: {why}")
    raise ConfigError(f"sharding rules without effect:\n{listed(lines, lines=True)}\nCorrect or remove them.")


def _names(entry: str | tuple[str, ...] | None) -> Iterator[str] | tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
