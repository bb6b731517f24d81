"""Several adapters of one base, by name: which are active, which of these is trained."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.adapters.attach import AdapterParam, adapters, detach, slots, virtual
from jaxft.errors import ModelError, did_you_mean
from jaxft.nn.adapter import Adapter


class StillAdapterParam(nnx.Param):
    """A parameter of an adapter that is active while another one is trained."""


class Together(Adapter):
    """Several adapters in one slot, each on what those before it gave."""

    def __init__(self, parts: list[Adapter]) -> None:
        super().__init__()
        self.parts = nnx.List(parts)

    def enter(self, x: jax.Array) -> jax.Array:
        """As `Adapter.enter`."""
        for part in self.parts:
            x = part.enter(x)
        return x

    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, key: jax.Array | None) -> jax.Array:
        """As `Adapter.__call__`."""
        for number, part in enumerate(self.parts):
            y = part(x, y, kernel, None if key is None else jax.random.fold_in(key, number))
        return y

    def merged(self, kernel: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        """As `Adapter.merged`."""
        for part in self.parts:
            kernel = part.merged(kernel, at)
        return kernel

    def merged_bias(self, bias: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        """As `Adapter.merged_bias`."""
        for part in self.parts:
            bias = part.merged_bias(bias, at)
        return bias


@dataclass
class Taken:
    """What one adapter puts into a model, taken out of it: of layers, of the rows' start, of all layers together."""

    layers: dict[str, Adapter]
    virtual: dict[str, nnx.Module] = field(default_factory=dict)
    shared: nnx.Module | None = None
    virtual_tokens: int = 0

    def modules(self) -> Iterator[nnx.Module]:
        """All that can be trained."""
        yield from (*self.layers.values(), *self.virtual.values())


def take(model: nnx.Module) -> Taken:
    """Empties a model's slots and returns what stood there."""
    taken = Taken(adapters(model), virtual(model), model.shared, model.virtual_tokens)
    detach(model)
    return taken


class AdapterSet:
    """Adapters of one model by name. The active ones stand in its slots; the others cost nothing but their memory.

    One alone stands there by itself, as if it were the only one. What training moves is moved here too, since these are
    the model's own modules: `nnx.update(model, state.trainable)`.
    """

    def __init__(self, model: nnx.Module) -> None:
        """Raises ModelError where the model has an adapter already: it would have no name."""
        if adapters(model) or virtual(model):
            raise ModelError("the model has an adapter without a name: load the base alone")
        self.model = model
        self.active: tuple[str, ...] = ()
        self.trained: str | None = None
        self._held: dict[str, Taken] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they came."""
        return tuple(self._held)

    def hold(self, name: str, taken: Taken) -> None:
        """Keeps an adapter under a name, not active. Raises ModelError for a name that is taken."""
        if name in self._held:
            raise ModelError(f"there is an adapter {name!r} already: choose another name, or drop that one")
        self._held[name] = taken

    def drop(self, name: str) -> None:
        """Forgets an adapter, which is no longer active then."""
        self[name]
        if name in self.active:
            trained = None if self.trained == name else self.trained
            self.activate(*(other for other in self.active if other != name), train=trained)
        del self._held[name]

    def __getitem__(self, name: str) -> Taken:
        """Raises ModelError for a name that there is not."""
        if name not in self._held:
            known = ", ".join(self._held) or "none"
            raise ModelError(f"there is no adapter {name!r}.{did_you_mean(name, self._held)} There are: {known}.")
        return self._held[name]

    def activate(self, *names: str, train: str | None = None) -> None:
        """Puts these adapters into the model, in this order; none leaves the base.

        train: the one of them that training is to move while the others stand still; all of them where None.
        Raises ModelError for a name that there is not, and for adapters that cannot be active together.
        """
        chosen = {name: self[name] for name in names}
        if train is not None and train not in chosen:
            raise ModelError(f"train={train!r} is not among the active adapters {', '.join(names) or '(none)'}")
        _refuse_clash(chosen)
        detach(self.model)
        for name, taken in chosen.items():
            for module in taken.modules():
                _retype(module, AdapterParam if train in (None, name) else StillAdapterParam)
        for path, layer in slots(self.model):
            parts = [taken.layers[path] for taken in chosen.values() if path in taken.layers]
            if parts:
                layer.adapter = parts[0] if len(parts) == 1 else Together(parts)
        for taken in chosen.values():
            if taken.shared is not None:
                self.model.shared = taken.shared
            if taken.virtual_tokens:
                _put_virtual(self.model, taken)
        self.active, self.trained = tuple(names), train


def _put_virtual(model: nnx.Module, taken: Taken) -> None:
    model.virtual_tokens = taken.virtual_tokens
    for path, module in taken.virtual.items():
        if path == "prompt":
            model.prompt = module
        else:
            model.layers[int(path.split("/")[1])].self_attn.prefix = module


def _refuse_clash(chosen: Mapping[str, Taken]) -> None:
    beginning = [name for name, taken in chosen.items() if taken.virtual_tokens]
    if len(beginning) > 1:
        raise ModelError(f"adapters {' and '.join(map(repr, beginning))} both put virtual tokens first: activate one")
    sharing = {name: taken.shared for name, taken in chosen.items() if taken.shared is not None}
    first = next(iter(sharing.values()), None)
    for name, shared in sharing.items():
        pairs = zip(*(jax.tree.leaves(nnx.state(module)) for module in (first, shared)), strict=True)
        if not all(a.shape == b.shape and bool(jnp.array_equal(a, b)) for a, b in pairs):
            raise ModelError(
                f"adapters {next(iter(sharing))!r} and {name!r} share other random matrices among their layers "
                "(r, seed or layers differ): activate one of them"
            )
    lone = [name for name, taken in chosen.items() if any(not part.stacks for part in taken.layers.values())]
    if lone and len(chosen) > 1:
        raise ModelError(f"adapter {lone[0]!r} is of a kind that must be alone in its layers: activate it by itself")


def _retype(module: nnx.Module, kind: type[nnx.Param]) -> None:
    for name, value in list(vars(module).items()):
        if isinstance(value, (AdapterParam, StillAdapterParam)) and type(value) is not kind:
            setattr(module, name, kind(value.get_value()))
