"""The adapters of tuned models in the places of an engine: the one that was idle for longest leaves."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.generation.called_tools import CallForm
from jaxft.resident import ResidentEngine

# The files that make a tokenizer and its chat template what they are.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class AdapterSlot:
    """number: of an adapter in the engine, 0 for the base. tokenizer, calls: how its model is asked."""

    number: int
    tokenizer: Tokenizer
    calls: CallForm | None


@dataclass
class AdapterSlots:
    """engine: has the adapters. base: how the base is asked, whose folder or file is `path`."""

    engine: ResidentEngine
    base: AdapterSlot
    path: str
    _slots: dict[str, AdapterSlot] = field(default_factory=dict)  # by model, the one used last at the end
    _tokenizers: dict[str, tuple[Tokenizer, CallForm | None]] = field(default_factory=dict)

    def slot_of(self, model: str, folder: str) -> AdapterSlot | None:
        """The place of a model, whose adapter is read unless it is there; None if every place is in use.

        Raises as `ResidentEngine.write_adapter` and `load_tokenizer` do.
        """
        slot = self._slots.pop(model, None)
        if slot is None:
            number = self._free()
            if number is None:
                return None
            self.engine.write_adapter(number, folder)
            slot = AdapterSlot(number, *self._tokenizer(Path(folder)))
        self._slots[model] = slot
        return slot

    @property
    def models(self) -> list[str]:
        """The models that have a place."""
        return list(self._slots)

    def _free(self) -> int | None:
        taken = {slot.number for slot in self._slots.values()}
        for number in range(1, self.engine.num_adapters + 1):
            if number not in taken:
                return number
        for model, slot in self._slots.items():
            if not self.engine.uses_of(slot.number):
                del self._slots[model]
                return slot.number
        return None

    def _tokenizer(self, folder: Path) -> tuple[Tokenizer, CallForm | None]:
        """That of the adapter's folder, whose template is the one of its training; the same for the same files."""
        files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        if not files:
            return self.base.tokenizer, self.base.calls
        digest = hashlib.sha256(
            b"\0".join(file.name.encode() + b"\0" + file.read_bytes() for file in files)
        ).hexdigest()
        if digest not in self._tokenizers:
            tokenizer = load_tokenizer(os.fspath(folder), base=self.path)
            self._tokenizers[digest] = (tokenizer, CallForm.of(tokenizer))
        return self._tokenizers[digest]
