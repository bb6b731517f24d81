"""The file system of gcsfs for buckets without folders, also where a program has imported gcsfs before."""

import os
from typing import Any

SWITCH = "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"  # read by gcsfs when it is imported first


def gcs_file_system() -> Any:
    """The class, which fsspec gives for gs:// from now on.

    The one that gcsfs has by default looks up the kind of every bucket through another API, whose search for
    credentials takes minutes where there are none. If SWITCH is set, it decides. Raises ImportError without gcsfs.
    """
    os.environ.setdefault(SWITCH, "false")
    import gcsfs

    if os.environ[SWITCH].lower() in ("true", "1"):
        return gcsfs.GCSFileSystem
    from fsspec import register_implementation
    from gcsfs.core import GCSFileSystem

    for protocol in ("gs", "gcs"):
        register_implementation(protocol, GCSFileSystem, clobber=True)
    return GCSFileSystem
