"""The coefficients of router losses in a run, for every method that trains models with experts."""

from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.nn.decoder import Decoder
from jaxft.objectives.router import RouterCoefficients


def router_coefficients(config: RunConfig, model: Decoder) -> RouterCoefficients | None:
    """The factors of the router losses of a run; None if both are zero. model: may be abstract.

    If the config leaves load_balancing out, it is the model's router_aux_loss_coef if its routers are trained, else 0.
    Raises ConfigError if such a loss is requested and the model has no routers.
    """
    balancing, z_loss = config.router.load_balancing, config.router.z_loss
    if model.experts is None and (balancing or z_loss):
        raise ConfigError(
            f"router.load_balancing={balancing} and router.z_loss={z_loss} are losses on the routers of experts, "
            "which this model does not have. Set them to None and 0."
        )
    if balancing is None:
        own = getattr(model.config, "router_aux_loss_coef", 0.0)
        balancing = own if _routers_are_trained(config, model) else 0.0
    return RouterCoefficients(load_balancing=balancing, z_loss=z_loss) if balancing or z_loss else None


def _routers_are_trained(config: RunConfig, model: Decoder) -> bool:
    if model.experts is None or config.adapter.kind != "none":
        return False
    return model.trainable_paths is None or any("/router/" in path for path in model.trainable_paths)
