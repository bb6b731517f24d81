"""The public functions stay functions, whatever is imported."""

import importlib
import pkgutil

import pytest

import jaxft


@pytest.mark.parametrize("name", jaxft.__all__)
def test_no_room_takes_a_public_functions_name(name):
    rooms = {found.name for found in pkgutil.iter_modules(jaxft.__path__)}
    assert name not in rooms
    for room in sorted(rooms - {"cli"}):
        importlib.import_module(f"jaxft.{room}")
    assert callable(getattr(jaxft, name))


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        jaxft.trian  # noqa: B018
