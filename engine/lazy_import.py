"""Objects by the place where they are: "module:name", so that a module is imported only when it is wanted."""

from __future__ import annotations

from importlib import import_module


def load_object(place: str) -> object:
    """The object that "module:name" names, as the registries write it. ImportError or AttributeError if none."""
    module, _, name = place.partition(":")
    found: object = getattr(import_module(module), name)
    return found
