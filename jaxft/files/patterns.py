"""Regular expressions of others, which may take for ever on a short text."""

import regex

from jaxft.errors import ModelError

SECONDS = 2.0  # for one text; names of modules take a millionth of it


def matches(pattern: str, text: str, *, whole: bool = True) -> bool:
    """Whether a regular expression matches a text: all of it, or only its beginning.

    Raises ModelError if it is none, or is not done after SECONDS.
    """
    try:
        match = regex.fullmatch if whole else regex.match
        return match(pattern, text, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise ModelError(
            f"the regular expression {pattern[:200]!r} of an adapter was stopped: after {SECONDS:g} seconds it is not "
            f"done with {text!r}. Write the names of the modules out in its adapter_config.json."
        ) from error
    except (regex.error, RecursionError, MemoryError) as error:
        raise ModelError(f"{pattern[:200]!r} of an adapter is no regular expression: {error}") from error
