"""The kind of a parameter, derived from its path: matrix or vector, stacked, of an adapter, of the vocabulary.

Layers of one kind are stacked along a leading axis; each of them is a parameter of its own. What is no parameter, and
still a number in files, is a Constant.
"""

from dataclasses import dataclass

from flax import nnx

VECTORS = ("scale", "bias", "taps")  # by the last part of their path, regardless of the axes that stacking adds
VIRTUAL = frozenset({"prompt", "prefix"})
ADAPTER = VIRTUAL | {"adapter", "shared"}
# A critic's adapters have the paths of the layers that they are for, behind the slot that holds the critic.
CRITIC = "value/"


class Constant(nnx.Param):
    """A variable that is loaded, saved and split over devices as parameters are, and never trained.

    Such as the bias by which a router's choice is balanced: transformers keeps it as a buffer of the module.
    """


@dataclass(frozen=True, kw_only=True)
class ParamKind:
    """The kind of one parameter, as `kind_of` finds it.

    stacked: the first axis counts layers. matrix: the last two axes are a matrix, not only the last a vector. adapter:
    it belongs to an adapter; virtual tokens and arrays that adapters share count as well. virtual: rows of virtual
    tokens. embedding: the embedding table. head: the LM head's kernel.
    """

    stacked: bool
    matrix: bool
    adapter: bool
    virtual: bool
    embedding: bool
    head: bool

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of one parameter, counted from the last."""
        return (-2, -1) if self.matrix else (-1,)

    @property
    def base_matrix(self) -> bool:
        """Whether it is a matrix of the base model."""
        return self.matrix and not self.adapter

    @property
    def hidden_matrix(self) -> bool:
        """Whether it is a matrix between hidden vectors: not of the vocabulary or of virtual tokens."""
        return self.matrix and not (self.embedding or self.head or self.virtual)


def kind_of(path: str, dimensions: int) -> ParamKind:
    """The kind of the parameter at `path`, such as `layers/0/self_attn/q_proj/kernel`. dimensions: number of axes of
    its array.
    """
    parts = path.removeprefix(CRITIC).split("/")
    stacked = parts[0] == "layers"
    return ParamKind(
        stacked=stacked,
        matrix=dimensions - stacked >= 2 and parts[-1] not in VECTORS,
        adapter=in_adapter(path),
        virtual=not VIRTUAL.isdisjoint(parts),
        embedding=parts[-1] == "embedding",
        head=path == "lm_head/kernel",
    )


def in_adapter(path: str) -> bool:
    """Whether the parameter at a path belongs to an adapter; see `ParamKind.adapter`."""
    return not ADAPTER.isdisjoint(path.split("/"))
