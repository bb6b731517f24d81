"""What is wrong with the rows of a set, in one error."""

from jaxft.config import DataConfig
from jaxft.data.rows.bad_rows import BadRows
from jaxft.data.rows.columns import UnreadColumns
from jaxft.errors import DataError


def check_rows(bad: BadRows, unread: UnreadColumns, config: DataConfig, total: int, source: str) -> None:
    """Raises DataError for bad rows and unread columns that the config does not leave out.

    total: rows of the set. source: its name in the error.
    """
    refusals = [bad.refusal(config.bad_rows, total, source), unread.refusal(source)]
    if any(refusals):
        raise DataError("\n".join(refusal for refusal in refusals if refusal))
