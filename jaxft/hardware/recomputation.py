"""Which rematerialisation policy `model.remat='auto'` takes: the cheapest one that fits into a device's memory."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxft.config import RunConfig
from jaxft.config.model import Policy

# From the one that costs least time and most memory to the one that costs most time and least memory.
POLICIES: tuple[Policy, ...] = ("none", "dots", "attention", "full", "offload")
MARGIN = 0.9  # share of the memory limit that an estimate may take: the compiler may need more


@dataclass(frozen=True, kw_only=True)
class Recomputation:
    """The policy of a run, and what led to it.

    peaks: bytes of one device during an update, by arithmetic, for each policy; empty if they decide nothing. limit:
    bytes of the device; None if it is not known. products: for each policy, the FLOPs of a step by those of the model's
    own products. after: the policies that are tried next, in this order, if the compiler refuses this one. why: more
    of the reasons, in words; None if the sizes say it all.
    """

    policy: Policy
    peaks: Mapping[Policy, int]
    limit: int | None
    products: Mapping[Policy, float]
    after: tuple[Policy, ...] = ()
    why: str | None = None

    def refused(self) -> "Recomputation":
        """The next policy, since the compiler found that the step does not fit with this one."""
        policy, *after = self.after
        why = f"the compiler refused {self.policy!r} for its memory"
        return dataclasses.replace(self, policy=policy, after=tuple(after), why=why)

    def describe(self) -> str:
        """The policy, what it costs and why it was taken, in a sentence."""
        parts = []
        if self.limit is not None and self.policy in self.peaks:
            less = POLICIES[: POLICIES.index(self.policy)]
            sizes = [f"{self.peaks[self.policy] / 2**30:.2f} of {self.limit / 2**30:.2f} GiB a device by arithmetic"]
            parts += sizes + [f"{name!r} would take {self.peaks[name] / 2**30:.2f} GiB" for name in less[-1:]]
        parts += [f"its products are {self.products[self.policy]:.2f} times the model's own"]
        return f"model.remat='auto' takes {self.policy!r}: {'; '.join([*parts, *filter(None, [self.why])])}"


def by_arithmetic(estimate: Callable[[Policy], tuple[int, float]], limit: int) -> Recomputation:
    """The first policy whose peak leaves the margin; the last one if none does.

    estimate: gives (bytes of one device, products as in `Recomputation`) with a policy. limit: bytes of one device.
    """
    estimates = {policy: estimate(policy) for policy in POLICIES}
    peaks = {policy: peak for policy, (peak, _) in estimates.items()}
    fitting = [number for number, policy in enumerate(POLICIES) if peaks[policy] <= MARGIN * limit]
    policy, *after = POLICIES[fitting[0] if fitting else -1 :]
    return Recomputation(
        policy=policy,
        peaks=peaks,
        limit=limit,
        products={policy: products for policy, (_, products) in estimates.items()},
        after=tuple(after),
        why=None if fitting else f"no policy takes less than {MARGIN:.0%} of the memory",
    )


def with_policy(config: RunConfig, policy: Policy) -> RunConfig:
    """The config with this `model.remat`."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=policy))
