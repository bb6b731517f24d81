"""What is carried to the hosts: one archive under its hash, the same for every attempt of a run."""

from jaxft.pods.pack.archive import Pack, pack
from jaxft.pods.pack.wheel import scripts_folder

__all__ = ["Pack", "pack", "scripts_folder"]
