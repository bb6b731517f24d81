"""A folder as a tar that is made while it is sent."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

PIECE = 2**20


def tar_pieces(folder: Path) -> Iterator[bytes]:
    """The bytes of a tar of the files in a folder, in order of their names, without owners. Links are left out."""
    for path in sorted(one for one in folder.rglob("*") if one.is_file() and not one.is_symlink()):
        info = tarfile.TarInfo(path.relative_to(folder).as_posix())
        with open(path, "rb") as file:
            info.size = path.stat().st_size
            yield info.tobuf(tarfile.PAX_FORMAT)
            rest = info.size
            while rest and (piece := file.read(min(PIECE, rest))):
                rest -= len(piece)
                yield piece
        yield bytes(-info.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)
