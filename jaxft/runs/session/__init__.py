"""Training by single calls from Python, on the parts of which whole runs are made."""

from jaxft.runs.session.rows import Answer
from jaxft.runs.session.session import Session

__all__ = ["Answer", "Session"]
