"""One tokenizer for text and chat, whatever file it came from.

Files: Hugging Face folders (`tokenizer.json`), SentencePiece `tokenizer.model` files, GGUF files,
`hf://owner/name`, addresses such as gs://bucket/model, and run or PEFT folders that hold one of these.
"""

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.data.chat import template_probes
from jaxft.errors import DataError, ModelError
from jaxft.files.paths import copy_small_files, is_remote
from jaxft.files.run_folder import ADAPTER, CHAT_TEMPLATE, MERGED, MODEL

HUB = "hf://"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
# Where a run folder keeps its exported tokenizer.
EXPORTS = (MERGED, MODEL, ADAPTER)
# Files beside a SentencePiece model that say how it is to be used.
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE)


class Tokenizer:
    """Text to token ids and back, and chats to text; a thin skin over a fast transformers tokenizer.

    Attributes: vocab_size (highest id + 1), bos_id, eos_id (None where there is none), pad_id
    (falls back to eos_id, then 0), stop_ids (ids that end an answer), chat_template (Jinja text or
    None), adds_bos (whether plain text begins with bos_id by this tokenizer's own convention).
    """

    def __init__(self, backend: Any, *, name: str = "", extra_stop_ids: Iterable[int] = ()) -> None:
        """backend: a transformers `PreTrainedTokenizerFast`. name: what errors call it."""
        self.backend, self.name = backend, name
        # A limit that the files suggest would make every longer text warn; lengths are ours to judge.
        backend.model_max_length = int(1e30)
        self.vocab_size: int = max(backend.get_vocab().values()) + 1
        self.bos_id: int | None = backend.bos_token_id
        self.eos_id: int | None = backend.eos_token_id
        pad = backend.pad_token_id
        self.pad_id: int = pad if pad is not None else self.eos_id if self.eos_id is not None else 0
        self.adds_bos: bool = self.bos_id is not None and backend("a")["input_ids"][:1] == [self.bos_id]
        turn_ends = set() if self.chat_template is None else _ends_of_turns(self)
        ends = {*extra_stop_ids, self.eos_id, *turn_ends} - {None}
        self.stop_ids: frozenset[int] = frozenset(int(i) for i in ends)

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that renders a conversation, or None."""
        return self.chat_templates.get("default")

    @property
    def chat_templates(self) -> dict[str, str]:
        """All templates by name: `default`, and some models' `tool_use`, which renders conversations with tools."""
        template = self.backend.chat_template
        if isinstance(template, Mapping):
            return dict(template)
        return {} if template is None else {"default": template}

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of text. add_special_tokens: add what the tokenizer itself adds, such as BOS."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and, for each, the characters [start, end) of text that it covers."""
        encoding = self.backend.backend_tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores."""
        encoded = self.backend.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids."""
        ids = [int(i) for i in ids]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def token(self, token_id: int) -> str:
        """The token's own spelling, such as `<|im_end|>`."""
        return self.backend.convert_ids_to_tokens(int(token_id))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> str:
        """The conversation as the model reads it, by the chat template in transformers' Jinja sandbox.

        messages: arguments of tool calls may be objects or JSON text; the template gets what it can print.
        kwargs are variables of the template, such as `enable_thinking`.
        Raises DataError where there is no template or it refuses the messages.
        """
        if any(message.get("tool_calls") for message in messages):
            messages = template_probes.with_arguments(messages, as_text=self._arguments_as_text)
        return self.rendered(messages, tools=tools, add_generation_prompt=add_generation_prompt, **kwargs)

    def rendered(self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None, **kwargs: Any) -> str:
        """`render` of messages that are as the template wants them."""
        # jinja2 comes with transformers; both stay unimported until a tokenizer is in use.
        from jinja2 import TemplateError

        if self.backend.chat_template is None:
            raise DataError(
                f"the tokenizer {self.name or 'in use'} has no chat template, so it cannot render messages. "
                "Set data.chat_template to a Jinja file, or use prompt/completion or text rows."
            )
        tools = list(tools) if tools else None
        try:
            return self.backend.apply_chat_template(list(messages), tools=tools, tokenize=False, **kwargs)
        except (TemplateError, TypeError) as error:
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise DataError(f"the chat template refuses these messages ({roles}): {error}") from error

    @functools.cached_property
    def _arguments_as_text(self) -> bool:
        return template_probes.wants_text(self.rendered)

    def generation_config(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """generation_config.json for a model with this tokenizer: every token that ended an answer in training
        ends one in serving. given: further fields to keep."""
        stops = sorted(self.stop_ids)
        return {
            **(given or {}),
            **({"bos_token_id": self.bos_id} if self.bos_id is not None else {}),
            **({"eos_token_id": stops[0] if len(stops) == 1 else stops} if stops else {}),
            "pad_token_id": self.pad_id,
        }

    def save(self, folder: str | os.PathLike[str]) -> list[str]:
        """Writes files that AutoTokenizer of transformers 4 and 5 reads back; returns their names."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        written = self.backend.save_pretrained(os.fspath(folder))
        _in_older_words(Path(folder) / "tokenizer_config.json")
        return sorted(os.path.basename(path) for path in written if os.path.isfile(path))


def _in_older_words(path: Path) -> None:
    # transformers 4 does not know the plain class by its new name, nor a list under extra_special_tokens; 5 reads both.
    settings = _json(path)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def load_tokenizer(
    path: str | os.PathLike[str], *, revision: str | None = None, chat_template: str | None = None
) -> Tokenizer:
    """The tokenizer of a model.

    path: Hugging Face folder, `tokenizer.model` file or folder with one, GGUF file, run or PEFT
    folder, `hf://owner/name[@revision]` (through the transformers cache; HF_HUB_OFFLINE is honoured), or
    the address of a folder such as gs://bucket/model, whose small files are fetched.
    revision: branch, tag or commit of an hf:// path.
    chat_template: path of a Jinja file, or Jinja text, that replaces the tokenizer's own.
    Raises ModelError where there is no tokenizer, or it needs code from its own folder; CheckpointError for
    an address that cannot be read.
    """
    path = os.fspath(path)
    backend, stop_ids = _load_any(path, revision)
    if chat_template is not None:
        backend.chat_template = _template_text(chat_template)
    if isinstance(backend.chat_template, str):
        # A file that is written and read again keeps no other line ends; Jinja renders all of them alike.
        backend.chat_template = backend.chat_template.replace("\r\n", "\n").replace("\r", "\n")
    return Tokenizer(backend, name=path, extra_stop_ids=stop_ids)


def _load_any(path: str, revision: str | None) -> tuple[Any, list[int]]:
    if path.startswith(HUB):
        return _load_hub(path, revision)
    return _load_remote(path) if is_remote(path) else _load_local(Path(path))


def _load_remote(address: str) -> tuple[Any, list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        copy_small_files(address, folder)
        try:
            return _load_local(Path(folder))
        except ModelError as error:
            raise ModelError(str(error).replace(folder, address)) from error


def _load_local(path: Path) -> tuple[Any, list[int]]:
    if path.suffix == ".gguf" and path.is_file():
        from jaxft.data.tokenizers.gguf import tokenizer_from_gguf

        return tokenizer_from_gguf(str(path))
    if path.is_file() and path.suffix == ".model":
        return _load_sentencepiece(path), _stops(path.parent / "generation_config.json")
    if path.is_file():
        path = path.parent if path.name in TOKENIZER_FILES else path
    if not path.is_dir():
        raise ModelError(f"no tokenizer at {str(path)!r}: it is neither a folder nor a .model or .gguf file")
    for folder in (path, *(path / name for name in EXPORTS)):
        settings = _json(folder / "tokenizer_config.json")
        _refuse_code(settings, str(folder))
        if (folder / "tokenizer.json").is_file():
            return _load_fast(str(folder), settings, local_files_only=True), _stops(folder / "generation_config.json")
        if (folder / "tokenizer.model").is_file():
            return _load_sentencepiece(folder / "tokenizer.model"), _stops(folder / "generation_config.json")
    return _load_named_base(path)


def _load_named_base(folder: Path) -> tuple[Any, list[int]]:
    """A PEFT folder without tokenizer files, or an unexported run, has the tokenizer of its base."""
    template = folder / CHAT_TEMPLATE
    base = _json(folder / "adapter_config.json").get("base_model_name_or_path")
    revision = _json(folder / "adapter_config.json").get("revision")
    if base is None:
        model = _json(folder / "config.json").get("model")
        if isinstance(model, Mapping):
            base, revision = model.get("path"), model.get("revision")
    if not base or Path(base).resolve() == folder.resolve():
        files = ", ".join(sorted(os.listdir(folder))[:8]) or "nothing"
        raise ModelError(
            f"no tokenizer in {str(folder)!r}: it needs tokenizer.json or tokenizer.model, and holds {files}. "
            "Copy the tokenizer files of the base model there."
        )
    backend, stops = _load_any(base if "://" in base or os.path.exists(base) else HUB + base, revision)
    if template.is_file():  # what a run was trained with, or an adapter is used with
        text, own = template.read_text(encoding="utf-8"), backend.chat_template
        if not isinstance(own, Mapping) or own.get("default") != text:
            backend.chat_template = text
    return backend, stops


def _load_hub(path: str, revision: str | None) -> tuple[Any, list[int]]:
    from transformers.utils import cached_file

    repo, _, pinned = path.removeprefix(HUB).strip("/").partition("@")
    if pinned and revision and pinned != revision:
        raise ModelError(f"{path} names the revision {pinned!r}, but {revision!r} is asked for")
    revision = pinned or revision

    def find(name: str) -> Path:
        found = cached_file(
            repo,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return Path(found or os.devnull)

    try:
        settings = _json(find("tokenizer_config.json"))
        _refuse_code(settings, path)
        if find("tokenizer.json").is_file():
            backend = _load_fast(repo, settings, revision=revision)
        else:
            backend = _load_class(repo, revision=revision)
        return backend, _stops(find("generation_config.json"))
    except OSError as error:
        raise ModelError(
            f"cannot get a tokenizer from {path!r}: {str(error).rstrip('.')}. Check the name and revision; "
            "without a network it must be in the Hugging Face cache already (HF_HOME), or give a local folder."
        ) from error


def _load_fast(name: str, settings: Mapping[str, Any], **kwargs: Any) -> Any:
    """What tokenizer.json says, whatever class the settings name: some classes of transformers rebuild the splitting
    from the vocabulary, and then the same folder gives other ids than its model was trained on."""
    from transformers import PreTrainedTokenizerFast

    try:
        backend = PreTrainedTokenizerFast.from_pretrained(name, **kwargs)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"transformers cannot load the tokenizer of {name!r}: {error}") from error
    if "eos_token" not in settings and settings.get("tokenizer_class") not in PLAIN_CLASSES:
        _name_special_tokens(backend, _load_class(name, **kwargs))
    return backend


def _load_class(name: str, **kwargs: Any) -> Any:
    # This import takes torch along where it is installed, so it is kept for the files that need it.
    from transformers import AutoTokenizer

    # mistral_format: mistral-common, where it is installed, would take over what holds tekken.json.
    kwargs |= {"use_fast": True, "trust_remote_code": False, "mistral_format": False}
    try:
        backend = AutoTokenizer.from_pretrained(name, **kwargs)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"transformers cannot load the tokenizer of {name!r}: {error}") from error
    if not getattr(backend, "is_fast", False):
        raise ModelError(f"{name!r} has only a slow tokenizer; convert it to tokenizer.json with transformers first")
    return backend


def _name_special_tokens(backend: Any, lender: Any) -> None:
    """Old folders (GPT-2's) leave it to the class to say which token ends a text."""
    vocabulary = backend.get_vocab()
    for role in SPECIAL_ROLES:
        token = getattr(lender, role)
        if getattr(backend, role) is None and token in vocabulary:
            setattr(backend, role, token)


def _load_sentencepiece(file: Path) -> Any:
    """transformers converts the model to a fast tokenizer; the sentencepiece library checks the result."""
    try:
        import sentencepiece
    except ImportError as error:
        raise ModelError(f"{str(file)!r} is a SentencePiece model: pip install sentencepiece protobuf") from error
    from transformers import PreTrainedTokenizerFast

    reference = sentencepiece.SentencePieceProcessor()
    try:
        reference.Load(str(file))
    except (RuntimeError, OSError) as error:
        raise ModelError(
            f"{str(file)!r} is not a SentencePiece model. Llama 3 ships a tiktoken file under this name: "
            "use a folder with its tokenizer.json."
        ) from error
    settings = _json(file.parent / "tokenizer_config.json")
    _refuse_code(settings, str(file.parent))
    # Where nothing says otherwise, BOS is added: the convention of Llama, Mistral and Gemma models.
    add_bos = settings.get("add_bos_token", reference.bos_id() >= 0)
    # A folder with just this model: the folder's config.json would choose a class that drops spaces.
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(file, Path(folder) / "tokenizer.model")
        for name in COMPANIONS:
            if (file.parent / name).is_file():
                shutil.copy(file.parent / name, Path(folder) / name)
        backend = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, add_bos_token=add_bos)
    for text in ("Hello, world!", "  two  spaces", "tabs\tand\nlines\n", "naïve 漢字 ☃", "x1234567 = 3.14"):
        ours, theirs = backend.encode(text, add_special_tokens=False), reference.EncodeAsIds(text)
        if ours != theirs:
            raise ModelError(
                f"{str(file)!r} cannot be converted exactly: {text!r} becomes {ours}, but the sentencepiece library "
                f"gives {theirs}. Use a folder with tokenizer.json."
            )
    return backend


def _ends_of_turns(tokenizer: Tokenizer) -> set[int]:
    """Ids of the added tokens with which the chat template ends an answer, and an answer that calls a tool."""
    added = tokenizer.backend.added_tokens_decoder
    ends = set()
    tail = template_probes.text_after_answer(tokenizer.rendered)
    if tail is not None:
        # SentencePiece puts a space piece before the first token of any text.
        ids = tokenizer.encode(tail.lstrip())
        after = next((i for i in ids if tokenizer.decode([i], skip_special_tokens=False).strip()), None)
        ends |= {after} & added.keys()
    tail = template_probes.text_after_call(tokenizer.rendered)
    if tail is not None:
        # Calls may be closed by tokens of their own before the turn is.
        ids = [i for i in tokenizer.encode(tail) if i in added and added[i].special]
        ends |= set(ids[-1:])
    return ends


def _template_text(template: str) -> str:
    if "{{" in template or "{%" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"cannot read the chat template {template!r}: {error.strerror}") from error


def _refuse_code(settings: Mapping[str, Any], where: str) -> None:
    auto_map = settings.get("auto_map")
    if auto_map and (not isinstance(auto_map, Mapping) or "AutoTokenizer" in auto_map):
        raise ModelError(
            f"the tokenizer of {where!r} wants to run Python code of its own (auto_map in tokenizer_config.json); "
            "jaxft runs none. Convert it to a tokenizer.json folder with a class that transformers knows."
        )


def _stops(file: Path) -> list[int]:
    """The end tokens that a generation_config.json names."""
    eos = _json(file).get("eos_token_id")
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _json(file: Path) -> dict[str, Any]:
    """The file's object; an empty one where there is no such file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{str(file)!r} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}
