"""Files that ship with jaxft: the quickstart's data, the `:smoke` model, the pages of reports and of `jaxft serve`."""

from pathlib import Path

ASSETS = Path(__file__).parent
