"""Records GAE, whitening and the value loss of verl: `python tests/oracles/record_gae.py FOLDER`.

FOLDER holds a checkout of verl. The script needs torch and writes gae.npz beside itself. What verl's modules import for
training on a cluster, and these functions never call, is replaced by stand-ins. The tests need neither torch nor verl.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from gae_cases import CLIPRANGE, SETTINGS, arrays, sampled_BT

CLUSTER = {"codetiming", "hydra", "omegaconf", "pyarrow", "ray", "tensordict", "torchdata", "vllm"}
OWN = ("verl.trainer.config", "verl.workers", "verl.single_controller", "verl.protocol", "verl.utils.device")


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives every module of a cluster's libraries, and of verl's parts that need them, as a stand-in."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in CLUSTER or name.startswith(OWN):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__version__ = [], "0"
        return module

    def exec_module(self, module):
        pass


def main():
    sys.meta_path.insert(0, StandIns())
    # The package without its `__init__`, which looks for devices.
    sys.modules["verl"] = types.ModuleType("verl")
    sys.modules["verl"].__path__ = [str(Path(sys.argv[1]) / "verl")]
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    version = (Path(sys.argv[1]) / "verl" / "version" / "version").read_text(encoding="utf-8").strip()
    rewards, values, predicted = (torch.as_tensor(x) for x in arrays())
    mask = torch.as_tensor(sampled_BT())
    out = {"version": np.array(version)}
    for name, (gamma, lam) in SETTINGS.items():
        advantages, returns = core.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
        out |= {f"{name}/advantages": advantages.numpy(), f"{name}/returns": returns.numpy()}
        given = predicted.clone().requires_grad_()
        loss, clipped = core.compute_value_loss(given, returns, values, mask, CLIPRANGE)
        loss.backward()
        out |= {f"{name}/value_loss": loss.detach().numpy(), f"{name}/clipped": clipped.numpy()}
        out[f"{name}/value_gradient"] = given.grad.numpy()
    np.savez(Path(__file__).with_name("gae.npz"), **out)
    print(version, sorted(out))


if __name__ == "__main__":
    main()
