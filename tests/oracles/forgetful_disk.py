"""A model of a disk that forgets, at a power cut, any part of what was not flushed.

Watched is a folder of the real file system. The only credit that the model gives is for `os.fsync`: of a file, its
bytes are then on the disk; of a folder, its entries are. Everything else that has happened since, in whatever order
(bytes, new entries, renames, removals), is on the disk or not, each for itself. This is harsher than journals of real
file systems, and it gives no credit for what libraries flush by themselves.
"""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

Image = dict[str, bytes]


class Node:
    """A file or a folder of the watched tree. flushed: its bytes, or its entries, as the disk certainly has them."""

    def __init__(self, folder: bool) -> None:
        self.folder = folder
        self.flushed: bytes | dict[str, Node] = {} if folder else b""
        self.now: bytes | dict[str, Node] = {} if folder else b""


class ForgetfulDisk:
    """Follows a folder; `images` draws what a cut could leave. cut: called at every moment at which it may differ."""

    def __init__(self, root: Path, cut: Callable[["ForgetfulDisk"], None], seed: int = 0) -> None:
        self.root, self._cut, self._chance = root, cut, random.Random(seed)
        self._nodes: dict[int, Node] = {}
        self._tree = Node(folder=True)
        self.cuts = 0
        self._scan()
        self._flush_all(self._tree)

    def watch(self, monkeypatch) -> None:
        """Sees every fsync from now on."""
        fsync = os.fsync

        def seen(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path == self.root or self.root in path.parents:
                self._moment()
                self._flush(path)
                self._moment()
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", seen)

    def end(self) -> None:
        """The last moment."""
        self._moment()

    def images(self, count: int) -> Iterator[Image]:
        """What the disk may hold after a cut now: file contents by path; folders only as parts of paths."""
        for _ in range(count):
            image: Image = {}
            self._draw(self._tree, "", image, keep=self._chance.choice([0.0, 0.3, 0.5, 0.8, 1.0]))
            yield image

    def _moment(self) -> None:
        self._scan()
        self.cuts += 1
        self._cut(self)

    def _scan(self) -> None:
        nodes: dict[int, Node] = {}

        def visit(path: Path, node: Node) -> None:
            entries: dict[str, Node] = {}
            for entry in os.scandir(path):
                number, folder = entry.inode(), entry.is_dir(follow_symlinks=False)
                known = self._nodes.get(number)
                child = known if known is not None and known.folder == folder else Node(folder)
                try:
                    if folder:
                        visit(Path(entry.path), child)
                    else:
                        child.now = Path(entry.path).read_bytes()
                except FileNotFoundError:  # another process has renamed or removed it
                    continue
                nodes[number] = entries[entry.name] = child
            node.now = entries

        visit(self.root, self._tree)
        self._nodes = nodes

    def _flush(self, path: Path) -> None:
        node = self._tree
        for part in path.relative_to(self.root).parts:
            node = node.now[part]
        node.flushed = dict(node.now) if node.folder else node.now

    def _flush_all(self, node: Node) -> None:
        node.flushed = dict(node.now) if node.folder else node.now
        for child in node.now.values() if node.folder else ():
            self._flush_all(child)

    def _draw(self, folder: Node, at: str, image: Image, keep: float) -> None:
        """keep: how likely it is that a change that was not flushed is on the disk all the same."""
        entries = dict(folder.flushed)
        before = {id(node): name for name, node in folder.flushed.items()}
        after = {id(node) for node in folder.now.values()}
        for name, node in folder.now.items():
            if entries.get(name) is node or self._chance.random() >= keep:
                continue
            entries[name] = node
            old = before.get(id(node))
            if old is not None and entries.get(old) is node:
                del entries[old]  # a rename is on the disk as one
        for name, node in folder.flushed.items():
            if name not in folder.now and id(node) not in after and self._chance.random() < keep:
                entries.pop(name, None)
        for name, node in entries.items():
            path = f"{at}{name}"
            if node.folder:
                self._draw(node, f"{path}/", image, keep)
            elif node.flushed == node.now or self._chance.random() >= keep:
                image[path] = node.flushed
            else:
                image[path] = node.now[: self._chance.choice([0, len(node.now) // 2, len(node.now)])]
