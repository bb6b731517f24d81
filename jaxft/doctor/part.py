"""What an examination of a machine says of one part of it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Part:
    """name: what was examined. text: what was seen, for people. value: the same for programs, of JSON values.

    mend: what to do about it if it keeps runs from working, else None.
    """

    name: str
    text: str
    value: Any = None
    mend: str | None = None

    @property
    def is_sound(self) -> bool:
        """Whether nothing has to be done about it."""
        return self.mend is None

    def to_json(self) -> dict[str, Any]:
        """The part as JSON."""
        return {"name": self.name, "sound": self.is_sound, "text": self.text, "value": self.value, "mend": self.mend}
