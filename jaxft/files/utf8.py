"""Text that came as bytes which are not UTF-8: Python keeps each such byte as a lone surrogate."""


def undecoded(text: str) -> str | None:
    """What is wrong with a text that was not UTF-8, as the end of a sentence; None if it is text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has bytes that are not UTF-8, from character {error.start + 1} on ({text[error.start]!a})"
    return None
