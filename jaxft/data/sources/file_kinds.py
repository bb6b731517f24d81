"""What a file of rows is: by the ending of its name, and by the bytes that it begins with."""

import re
from dataclasses import dataclass

from jaxft.errors import DataError

HEAD = 4096  # bytes of a file that are looked at
KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow", ".txt": "text", ".text": "text",
    ".md": "text",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
# First bytes, and what a file with them is.
MAGIC = (
    (b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bz2"), (b"\xfd7zXZ\x00", "xz"),
    (b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow"), (b"PK\x03\x04", "zip"),
    (b"%PDF", "PDF"), (b"\x80\x04", "pickle"), (b"\x80\x05", "pickle"), (b"\x93NUMPY", "NumPy"),
)  # fmt: skip
BINARY = ("parquet", "arrow")
# Kinds that hold no rows which jaxft reads, and what to do about them.
OTHERS = {
    "zip": "Unpack it first; the sheets of an .xlsx file can be saved as CSV",
    "PDF": "Write its text into a .jsonl file, one object such as {\"text\": ...} a line",
    "pickle": "Loading it would run code. Write its rows into a .jsonl or .parquet file",
    "NumPy": "Write its rows into a .jsonl or .parquet file",
}  # fmt: skip
READ = ".json, .jsonl, .csv, .tsv or .txt (also .gz, .zst, .bz2, .xz), .parquet or .arrow"
# How a file of JSON objects begins, whatever its name.
OBJECT = re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*"[^"\n]*"\s*:')
UTF_16 = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
UTF_32 = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32"}


@dataclass(frozen=True)
class FileKind:
    """What a file is: one of the values of KINDS; and the compression around it, if any."""

    name: str
    compression: str | None = None


def kind_by_name(path: str) -> FileKind | None:
    """What a file is by the ending of its name, in upper or lower case; None if the ending says nothing."""
    name, compression = path.lower(), None
    if name.startswith(("http://", "https://")):
        name = name.partition("?")[0]
    for ending, packed in COMPRESSIONS.items():
        if name.endswith(ending):
            name, compression = name.removesuffix(ending), packed
            break
    kinds = [kind for ending, kind in KINDS.items() if name.endswith(ending)]
    return FileKind(kinds[0], compression) if kinds else None


def compression_of(path: str, head: bytes) -> str | None:
    """The compression around a file, of which `head` is the beginning.

    Raises DataError if its ending names another one, or none.
    """
    by_name = kind_by_name(path)
    actual = _magic(head)
    compression = actual if actual in COMPRESSIONS.values() else None
    if by_name is not None and by_name.compression != compression:
        named = f"{by_name.compression} data" if by_name.compression else f"an uncompressed {by_name.name} file"
        raise DataError(
            f"cannot read {path!r}: its ending says that it is {named}, but its first bytes are "
            f"{f'those of {actual} data' if actual else 'not of that'}. {_rename(actual)}"
        )
    return compression


def kind_of(path: str, head: bytes) -> str:
    """What a file is, of which `head` is the beginning after decompression.

    Raises DataError if it is none of the kinds that are read, not what its ending says, empty, or not UTF-8.
    """
    by_name = kind_by_name(path)
    if not head:
        raise DataError(f"{path!r} is empty: it has 0 bytes, so there is nothing to read")
    actual = _magic(head)
    if actual in OTHERS:
        raise DataError(f"cannot read {path!r}: it is a {actual} file. {OTHERS[actual]}.")
    if by_name is not None and (by_name.name in BINARY or actual) and by_name.name != actual:
        if by_name.name == "arrow" and actual is None:
            return "arrow"  # a stream of an older version begins with a length
        raise DataError(
            f"cannot read {path!r}: its ending says that it is a {by_name.name} file, but its first bytes are "
            f"{f'those of a {actual} file' if actual else 'not of one'}. {_rename(actual)}"
        )
    if actual:
        return actual
    check_encoding(path, head)
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if by_name is not None:
        if by_name.name == "text" and OBJECT.match(head):
            return "json"
        if by_name.name == "jsonl" and first == b"[":
            raise DataError(
                f"cannot read {path!r}: its ending says one JSON object a line, but it begins with '[': rename it to "
                ".json if it is one array of rows"
            )
        return by_name.name
    if first in (b"{", b"["):
        return "json"
    raise DataError(
        f"cannot tell what {path!r} is from its name or its first bytes {head[:16]!r}. Rename it if it is a file with "
        f"rows ({READ}); plain text ends in .txt."
    )


def check_encoding(path: str, head: bytes) -> None:
    """Raises DataError, with the command that mends it, for text in UTF-16 or UTF-32."""
    name = UTF_32.get(head[:4]) or UTF_16.get(head[:2])
    if name is None and head.count(0) * 4 > len(head) > 1:  # ASCII in UTF-16 has a zero in every other byte
        odd = head[1::2].count(0) > head[::2].count(0)
        name = "UTF-16LE" if odd else "UTF-16BE"
    if name is not None:
        raise DataError(
            f"{path!r} is {name} text, as `>` in Windows PowerShell writes it; jaxft reads UTF-8. "
            f"{reencode(path, name)}"
        )


def reencode(path: str, encoding: str) -> str:
    """The sentence that says how to write a text file anew in UTF-8."""
    name = path.replace("\\", "/").rpartition("/")[2]
    return f"Write it anew: iconv -f {encoding} -t UTF-8 {name} > utf8-{name}"


def _magic(head: bytes) -> str | None:
    return next((kind for first, kind in MAGIC if head.startswith(first)), None)


def _rename(actual: str | None) -> str:
    if actual in OTHERS:
        return f"{OTHERS[actual]}."
    if actual in COMPRESSIONS.values():
        ending = next(ending for ending, packed in COMPRESSIONS.items() if packed == actual)
        return f"Rename it so that it ends in {ending}, as in rows.jsonl{ending}."
    if actual:
        return f"Rename it so that it ends in .{actual}."
    return "Rename it by what it is, or fetch it again: a page with an error may have taken its name."
