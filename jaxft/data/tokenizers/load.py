"""Loads a tokenizer from any of the files that models come with.

Files: Hugging Face folders (`tokenizer.json`), SentencePiece `tokenizer.model` files, GGUF files,
`hf://owner/name`, addresses such as gs://bucket/model, and run or PEFT folders that hold one of these.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxft.config import RunConfig
from jaxft.data.chat import template_text
from jaxft.data.tokenizers.end_tokens import end_tokens_at
from jaxft.data.tokenizers.files import check_tokenizer_links, hub_file, json_in
from jaxft.data.tokenizers.table import table_rows
from jaxft.data.tokenizers.templates import fixed_template, read_template, replaced
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import ModelError, listed
from jaxft.files.adapter_base import CONFIG as ADAPTER_CONFIG
from jaxft.files.adapter_base import base_of, base_revision
from jaxft.files.hub import fetch_hub, hub_path, reaching_hub
from jaxft.files.paths import copy_small_files, hub_hint, is_remote
from jaxft.files.run_folder import ADAPTER, CHAT_TEMPLATE, MERGED, MODEL
from jaxft.home import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HUB = "hf://"
UNUSUAL = "a \u6f22\u00df\x00\U0001f642"  # of several scripts, so that small vocabularies have no token for some of it
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
# Where a run folder keeps its exported tokenizer.
EXPORTS = (MERGED, MODEL, ADAPTER)
# Files beside a SentencePiece model that say how it is to be used.
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE)


def load_tokenizer(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    base: str | None = None,
    chat_template: str | None = None,
    template_date: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    model: str | None = None,
) -> Tokenizer:
    """The tokenizer of a model.

    path: Hugging Face folder, `tokenizer.model` file or folder with one, GGUF file, run or PEFT
    folder, `hf://owner/name[@revision]` (through the transformers cache; HF_HUB_OFFLINE is honoured), or
    the address of a folder such as gs://bucket/model, whose small files are fetched.
    revision: branch, tag or commit of an hf:// path. base: of a PEFT folder, where its base is, whose tokenizer it has
    if it comes without one.
    chat_template: replaces the tokenizer's own: the name of a built-in template, the path of a Jinja file, or Jinja
    text.
    template_date: the date, such as 2026-11-29, that the template shows if it reads the clock; None: today's, or the
    one that a run has fixed in it. chat_template_kwargs: values of the template's variables, for every rendering that
    does not give others. Both become part of the template, and so of what `Tokenizer.save` writes.
    model: the path of the model, if its tokenizer is elsewhere.
    Raises ModelError if there is no tokenizer, or it needs code from its own folder; CheckpointError for an address
    that cannot be read; ConfigError for a variable that the template does not read, and for a date that it does not
    show.
    """
    path = local_path(path)
    backend, stop_ids = _load_any(path, revision, base)
    if chat_template is not None:
        backend.chat_template = replaced(backend.chat_template, read_template(chat_template, backend, path))
    if isinstance(backend.chat_template, str):
        # Other line ends do not survive writing and reading a file; Jinja renders all of them alike.
        backend.chat_template = backend.chat_template.replace("\r\n", "\n").replace("\r", "\n")
    if template_date is not None or chat_template_kwargs:
        backend.chat_template = fixed_template(backend.chat_template, template_date, chat_template_kwargs or {}, path)
    _check_encodes(backend, path)
    rows = table_rows(path, revision, base) if model is None else table_rows(local_path(model), None, base)
    return Tokenizer(backend, name=path, extra_stop_ids=stop_ids, table_rows=rows)


def tokenizer_of(config: RunConfig, path: str | None = None) -> Tokenizer:
    """The tokenizer of a run, with the chat template that the `data` section of its config describes.

    path: of another model than the config's, whose tokenizer it is. A template that reads the clock shows
    `data.template_date`, or today's date, and then as long as the tokenizer lives. Raises as `load_tokenizer` does.
    """
    model, data = config.model, config.data
    elsewhere = model.tokenizer if path is None else None
    tokenizer = load_tokenizer(
        path or elsewhere or model.path,
        revision=model.revision if path is None and elsewhere is None else None,
        base=None if elsewhere else model.base,
        model=model.path if elsewhere else None,
        chat_template=data.chat_template,
        template_date=data.template_date,
        chat_template_kwargs=data.chat_template_kwargs,
    )
    if model.added_tokens and path is None:
        tokenizer = tokenizer.add_tokens(model.added_tokens)
    if tokenizer.chat_template is not None and data.template_date is None:
        tokenizer.fix_date(template_text.today())
    return tokenizer


def _load_any(path: str, revision: str | None, base: str | None = None) -> tuple["PreTrainedTokenizerFast", list[int]]:
    if path.startswith(HUB):
        return _load_hub(path, revision, base)
    return _load_remote(path, base) if is_remote(path) else _load_local(Path(path), base)


def _load_remote(address: str, base: str | None) -> tuple["PreTrainedTokenizerFast", list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        copy_small_files(address, folder)
        try:
            return _load_local(Path(folder), base)
        except ModelError as error:
            raise ModelError(str(error).replace(folder, address)) from error


def _load_local(path: Path, base: str | None = None) -> tuple["PreTrainedTokenizerFast", list[int]]:
    if path.suffix == ".gguf" and path.is_file():
        from jaxft.data.tokenizers.gguf import tokenizer_from_gguf

        return tokenizer_from_gguf(str(path))
    if path.is_file() and path.suffix == ".model":
        check_tokenizer_links(path.parent)
        backend = _load_sentencepiece(path)
        return backend, end_tokens_at(str(path.parent), None, _is_added(backend))
    if path.is_file():
        path = path.parent if path.name in TOKENIZER_FILES else path
    if not path.is_dir():
        raise ModelError(
            f"no tokenizer at {str(path)!r}: it is neither a folder nor a .model or .gguf file.{hub_hint(str(path))}"
        )
    for folder in (path, *(path / name for name in EXPORTS)):
        if folder.is_dir():
            check_tokenizer_links(folder)
        settings = json_in(folder / "tokenizer_config.json")
        _refuse_code(settings, str(folder))
        if (folder / "tokenizer.json").is_file():
            backend = _load_fast(str(folder), settings, local_files_only=True)
            return backend, end_tokens_at(str(folder), None, _is_added(backend), base)
        if (folder / "tokenizer.model").is_file():
            backend = _load_sentencepiece(folder / "tokenizer.model")
            return backend, end_tokens_at(str(folder), None, _is_added(backend), base)
    return _load_named_base(path, base)


def _load_named_base(folder: Path, base: str | None) -> tuple["PreTrainedTokenizerFast", list[int]]:
    """A PEFT folder without tokenizer files, or an unexported run, has the tokenizer of its base."""
    template = folder / CHAT_TEMPLATE
    if (folder / ADAPTER_CONFIG).is_file():
        origin = base_of(str(folder), base)
        backend, stops = _load_any(origin, base_revision(str(folder), origin, base))
    else:
        model = json_in(folder / "config.json").get("model")
        named = model.get("path") if isinstance(model, Mapping) else None
        if not isinstance(model, Mapping) or not isinstance(named, str) or Path(named).resolve() == folder.resolve():
            files = listed(sorted(os.listdir(folder))) or "nothing"
            raise ModelError(
                f"no tokenizer in {str(folder)!r}: it needs tokenizer.json or tokenizer.model, and contains {files}. "
                "Copy the tokenizer files of the base model there."
            )
        backend, stops = _load_any(named, model.get("revision"), model.get("base"))
    if template.is_file():  # the template that a run was trained with
        backend.chat_template = replaced(backend.chat_template, template.read_text(encoding="utf-8"))
    return backend, stops


def _load_hub(path: str, revision: str | None, base: str | None) -> tuple["PreTrainedTokenizerFast", list[int]]:
    location = hub_path(path, revision)
    if location.file is not None:
        return _load_local(Path(fetch_hub(path, revision)))
    repo, revision = location.repo, location.revision
    try:
        settings = json_in(hub_file(repo, "tokenizer_config.json", revision))
        _refuse_code(settings, path)
        adapter = hub_file(repo, ADAPTER_CONFIG, revision)
        with reaching_hub():
            if hub_file(repo, "tokenizer.json", revision).is_file():
                backend = _load_fast(repo, settings, revision=revision)
            elif adapter.is_file() and not settings:
                return _load_named_base(adapter.parent, base)
            else:
                backend = _load_class(repo, revision=revision)
        return backend, end_tokens_at(path, revision, _is_added(backend), base)
    except OSError as error:
        raise ModelError(
            f"cannot get a tokenizer from {path!r}: {str(error).rstrip('.')}. Check the name and revision; "
            "without a network it must be in the Hugging Face cache already (HF_HOME), or give a local folder."
        ) from error


def _is_added(backend: "PreTrainedTokenizerFast") -> Callable[[int], bool]:
    return backend.added_tokens_decoder.__contains__


def _load_fast(name: str, settings: Mapping[str, Any], **kwargs: Any) -> "PreTrainedTokenizerFast":
    """The contents of tokenizer.json, regardless of the class that the settings name.

    Some classes of transformers rebuild the pre-tokenizer from the vocabulary; the same folder then gives other ids
    than its model was trained on.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        backend = PreTrainedTokenizerFast.from_pretrained(name, **kwargs)
    except OSError:
        raise
    except Exception as error:  # of a stranger's file, in whatever part of transformers or tokenizers
        raise _unreadable(name, error) from error
    if "eos_token" not in settings and settings.get("tokenizer_class") not in PLAIN_CLASSES:
        _name_special_tokens(backend, _load_class(name, **kwargs))
    return backend


def _load_class(name: str, **kwargs: Any) -> "PreTrainedTokenizerFast":
    # AutoTokenizer imports torch if it is installed, so it is imported only for files that need it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # mistral_format: mistral-common, if it is installed, would otherwise read folders with a tekken.json.
    kwargs |= {"use_fast": True, "trust_remote_code": False, "mistral_format": False}
    try:
        backend = AutoTokenizer.from_pretrained(name, **kwargs)
    except OSError:
        raise
    except Exception as error:  # of a stranger's file, in whatever part of transformers or tokenizers
        raise _unreadable(name, error) from error
    if not isinstance(backend, PreTrainedTokenizerFast):
        raise ModelError(f"{name!r} has only a slow tokenizer; convert it to tokenizer.json with transformers first")
    return backend


def _check_encodes(backend: "PreTrainedTokenizerFast", path: str) -> None:
    """Raises ModelError for a tokenizer that fails on text, such as one whose unknown token is not in its table."""
    try:
        backend.encode(UNUSUAL, add_special_tokens=False)
    except Exception as error:  # of a stranger's file, in whatever part of tokenizers
        raise _unreadable(path, error) from error


def _unreadable(name: str, error: Exception) -> ModelError:
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error) or type(error).__name__
    return ModelError(
        f"transformers cannot load the tokenizer of {name!r}: {reason.rstrip('.')}. Take its files again from where "
        "the model was published."
    )


def _name_special_tokens(backend: "PreTrainedTokenizerFast", by_class: "PreTrainedTokenizerFast") -> None:
    """In old folders (GPT-2's) only the tokenizer class names the token that ends a text."""
    vocabulary = backend.get_vocab()
    for role in SPECIAL_ROLES:
        token = getattr(by_class, role)
        if getattr(backend, role) is None and token in vocabulary:
            setattr(backend, role, token)


def _load_sentencepiece(file: Path) -> "PreTrainedTokenizerFast":
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
    settings = json_in(file.parent / "tokenizer_config.json")
    _refuse_code(settings, str(file.parent))
    # Unless the settings say otherwise, BOS is added: the convention of Llama, Mistral and Gemma models.
    add_bos = settings.get("add_bos_token", reference.bos_id() >= 0)
    # In a folder of its own: the config.json of the model's folder would choose a class that drops spaces.
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


def _refuse_code(settings: Mapping[str, Any], where: str) -> None:
    auto_map = settings.get("auto_map")
    if auto_map and (not isinstance(auto_map, Mapping) or "AutoTokenizer" in auto_map):
        raise ModelError(
            f"the tokenizer of {where!r} needs Python code from its own folder (auto_map in tokenizer_config.json), "
            "and jaxft runs none. Convert it to a tokenizer.json folder with a class that transformers knows."
        )
