"""Files that ship with jaxft: the quickstart's data, the `:smoke` model, the report's page."""

from pathlib import Path

ASSETS = Path(__file__).parent
