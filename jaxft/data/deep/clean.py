"""Writes the training rows without those that a deep examination leaves out."""

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

from jaxft.data.deep.texts import Texts
from jaxft.data.rows.values import present
from jaxft.errors import DataError
from jaxft.files.atomic import write_file


def write_cleaned(texts: Texts, dropped: Mapping[int, str], path: str) -> int:
    """Writes the training rows but those of `dropped` as JSON lines, and returns their number.

    Rows keep their fields and their order; cells that are absent are left out. The file appears whole or not at all.
    Raises DataError if no row is left, and for a row with a value that JSON does not have.
    """
    if len(dropped) == texts.train:
        raise DataError(
            f"all {texts.train:,} training rows would be left out, so nothing is written: leave fewer reasons in --drop"
        )
    written = 0

    def fill(file: BinaryIO) -> None:
        nonlocal written
        for index in range(texts.train):
            if index not in dropped:
                file.write(_line(texts.fields(index), texts.where(index)).encode())
                written += 1

    write_file(path, fill)
    return written


def _line(fields: Mapping[str, Any], where: str) -> str:
    try:
        return json.dumps(present(fields), ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where} has a value that JSON does not have ({error}), so it cannot be a JSON line: remove the "
            "column, or clean the rows in their own format by the findings of --json"
        ) from error
