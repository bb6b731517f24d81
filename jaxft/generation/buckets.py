"""Rounded-up sizes: a few compiled shapes serve all lengths."""

SMALLEST = 16


def bucket(n: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that is at least n; above 16, less than a third of it is padding."""
    size = SMALLEST
    while size < n:
        if size + size // 2 >= n:
            return size + size // 2
        size *= 2
    return size


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
