"""Several adapters of one base, by name. Some of them are active, and one or all of these are trained."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.adapters.attach import AdapterParam, VirtualTokens, adapters, detach, set_adapter, slots, virtual_modules
from jaxft.errors import ModelError, did_you_mean
from jaxft.nn.adapter import Adapter, LayerAdapter
from jaxft.nn.decoder import Decoder, SharedArrays


class FrozenAdapterParam(nnx.Param):
    """A parameter of an adapter that is active but frozen, because another adapter is trained."""


class AdapterSequence(Adapter):
    """Several adapters in one slot; each is applied to the result of the previous ones."""

    def __init__(self, parts: list[Adapter]) -> None:
        super().__init__()
        self.parts = nnx.List(parts)

    def enter(self, x: jax.Array) -> jax.Array:
        for part in self.parts:
            x = part.enter(x)
        return x

    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, key: jax.Array | None) -> jax.Array:
        for number, part in enumerate(self.parts):
            y = part(x, y, kernel, None if key is None else jax.random.fold_in(key, number))
        return y

    def merged(self, kernel: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        for part in self.parts:
            kernel = part.merged(kernel, at)
        return kernel

    def merged_bias(self, bias: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        for part in self.parts:
            bias = part.merged_bias(bias, at)
        return bias


@dataclass
class AdapterModules:
    """The modules of one adapter, outside a model: by layer, for virtual tokens, and shared by all layers."""

    layers: dict[str, LayerAdapter]
    virtual: dict[str, VirtualTokens] = field(default_factory=dict)
    shared: SharedArrays | None = None
    virtual_tokens: int = 0

    def trainable(self) -> Iterator[LayerAdapter | VirtualTokens]:
        """All modules with trainable parameters."""
        yield from self.layers.values()
        yield from self.virtual.values()


def take(model: Decoder) -> AdapterModules:
    """Empties a model's slots and returns their modules."""
    modules = AdapterModules(adapters(model), virtual_modules(model), model.shared, model.virtual_tokens)
    detach(model)
    return modules


class AdapterSet:
    """Adapters of one model by name. The active ones are in its slots; the others cost only their memory. A single
    active adapter fills the slots directly, as without a set. `nnx.update(model, state.trainable)` after training
    changes the adapters of the set, because they are the model's own modules.
    """

    def __init__(self, model: Decoder) -> None:
        """Raises ModelError if the model has an adapter already, which would have no name."""
        if adapters(model) or virtual_modules(model):
            raise ModelError("the model has an adapter without a name: load the base alone")
        self.model = model
        self.active: tuple[str, ...] = ()
        self.trained: str | None = None
        self._adapters: dict[str, AdapterModules] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order in which the adapters were added."""
        return tuple(self._adapters)

    def add(self, name: str, modules: AdapterModules) -> None:
        """Adds an adapter, which is not active yet. Raises ModelError for a name that is in use."""
        if name in self._adapters:
            raise ModelError(f"there is an adapter {name!r} already: choose another name, or drop that one")
        self._adapters[name] = modules

    def drop(self, name: str) -> None:
        """Removes an adapter; if it is active, it is deactivated first. Raises ModelError for an unknown name."""
        self[name]
        if name in self.active:
            trained = None if self.trained == name else self.trained
            self.activate(*(other for other in self.active if other != name), train=trained)
        del self._adapters[name]

    def __getitem__(self, name: str) -> AdapterModules:
        """Raises ModelError for an unknown name."""
        if name not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise ModelError(f"there is no adapter {name!r}.{did_you_mean(name, self._adapters)} There are: {known}.")
        return self._adapters[name]

    def activate(self, *names: str, train: str | None = None) -> None:
        """Puts these adapters, in this order, into the model and removes all others; without names all are removed.

        train: the only trainable one of them; None: all are trainable. Raises ModelError for an unknown name, and for
        adapters that cannot be active at the same time.
        """
        chosen = {name: self[name] for name in names}
        if train is not None and train not in chosen:
            raise ModelError(f"train={train!r} is not among the active adapters {', '.join(names) or '(none)'}")
        _refuse_clash(chosen)
        detach(self.model)
        for name, modules in chosen.items():
            for module in modules.trainable():
                _retype(module, AdapterParam if train in (None, name) else FrozenAdapterParam)
        for path, layer in slots(self.model):
            parts = [modules.layers[path] for modules in chosen.values() if path in modules.layers]
            if parts:
                set_adapter(layer, parts[0] if len(parts) == 1 else AdapterSequence(_linear_adapters(parts)))
        for modules in chosen.values():
            if modules.shared is not None:
                self.model.shared = modules.shared
            if modules.virtual_tokens:
                _attach_virtual(self.model, modules)
        self.active, self.trained = tuple(names), train


def _linear_adapters(parts: list[LayerAdapter]) -> list[Adapter]:
    # Adapters of embeddings and experts do not stack, and are refused above.
    return [part for part in parts if isinstance(part, Adapter)]


def _attach_virtual(model: Decoder, modules: AdapterModules) -> None:
    model.virtual_tokens = modules.virtual_tokens
    for path, module in modules.virtual.items():
        *parents, slot = path.split("/")
        setattr(model.layers[int(parents[1])].attention if parents else model, slot, module)


def _refuse_clash(chosen: Mapping[str, AdapterModules]) -> None:
    virtual = [name for name, modules in chosen.items() if modules.virtual_tokens]
    if len(virtual) > 1:
        raise ModelError(f"adapters {' and '.join(map(repr, virtual))} both put virtual tokens first: activate one")
    sharing = {name: modules.shared for name, modules in chosen.items() if modules.shared is not None}
    first = next(iter(sharing.values()), None)
    for name, shared in sharing.items():
        pairs = zip(*(jax.tree.leaves(nnx.state(module)) for module in (first, shared)), strict=True)
        if not all(a.shape == b.shape and bool(jnp.array_equal(a, b)) for a, b in pairs):
            raise ModelError(
                f"adapters {next(iter(sharing))!r} and {name!r} share other random matrices among their layers "
                "(r, seed or layers differ): activate one of them"
            )
    exclusive = [name for name, modules in chosen.items() if any(not part.stacks for part in modules.layers.values())]
    if exclusive and len(chosen) > 1:
        raise ModelError(
            f"adapter {exclusive[0]!r} is of a kind that must be alone in its layers: activate it by itself"
        )


def _retype(module: LayerAdapter | VirtualTokens, kind: type[nnx.Param]) -> None:
    for name, value in list(vars(module).items()):
        if isinstance(value, (AdapterParam, FrozenAdapterParam)) and type(value) is not kind:
            setattr(module, name, kind(value.get_value()))
