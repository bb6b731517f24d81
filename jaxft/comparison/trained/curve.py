"""Would more rows help? The held-out loss against the number of training rows, and with twice as many."""

from collections.abc import Sequence
from typing import Any

import numpy as np

FEWEST = 4  # points of a curve that is continued
EXPONENTS = np.arange(0.02, 2.001, 0.01)
FLAT = 0.01  # a relative change below which a curve is called flat


def fit(rows: Sequence[float], losses: Sequence[float]) -> tuple[float, float, float]:
    """(e, b, c) of e + b n^-c, n rows, with e and b not negative, by least squares; c is one of `EXPONENTS`."""
    from scipy.optimize import nnls

    n, y = np.asarray(rows, np.float64), np.asarray(losses, np.float64)
    most, best = max(rows), None
    for c in EXPONENTS:
        (e, b), error = nnls(np.stack([np.ones_like(n), (n / most) ** -c], axis=1), y)
        if best is None or error < best[0] - 1e-12:
            best = (error, e, b * most**c, float(c))
    if best is None:
        raise ValueError("a curve without points has no fit")
    return best[1], best[2], best[3]


def at(curve: tuple[float, float, float], rows: float) -> float:
    """The value of a curve at a number of rows."""
    e, b, c = curve
    return float(e + b * rows**-c)


def more_rows(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What twice the rows would do to the loss, if it goes on so.

    points: `rows` and `loss` of each. Returns `sentence` and, if there are `FEWEST` points or more, `change`, relative
    to the loss with all rows, and `range`, of the changes if each other point is left out in turn.
    """
    ordered = sorted(points, key=lambda point: point["rows"])
    if len(ordered) < FEWEST:
        return {"sentence": f"Too few points to say what more rows would do: {len(ordered)} of at least {FEWEST}."}
    rows, losses = [one["rows"] for one in ordered], [one["loss"] for one in ordered]
    change = _change(rows, losses)
    others = [
        _change(rows[:left] + rows[left + 1 :], losses[:left] + losses[left + 1 :]) for left in range(len(rows) - 1)
    ]
    low, high = min([change, *others]), max([change, *others])
    numbers = {"change": change, "range": [low, high]}
    if change > -FLAT:
        return numbers | {"sentence": "The curve is flat: better rows would help, not more of them."}
    return numbers | {
        "sentence": f"Twice the rows would lower the held-out loss by {-100 * change:.0f} % ({-100 * high:.0f} to "
        f"{-100 * low:.0f}), if it goes on so."
    }


def _change(rows: Sequence[float], losses: Sequence[float]) -> float:
    curve = fit(rows, losses)
    return at(curve, 2 * max(rows)) / at(curve, max(rows)) - 1
