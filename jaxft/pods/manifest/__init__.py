"""`jaxft pod manifest`: files for programs that run jobs on TPUs, written in place of acting."""

from jaxft.pods.manifest.request import KINDS, ManifestRequest
from jaxft.pods.manifest.write import manifest

__all__ = ["KINDS", "ManifestRequest", "manifest"]
