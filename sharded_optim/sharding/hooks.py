"""A stand-in for hooks in copies of a model, as the hooks themselves hold parameters and other objects of an optimizer."""

from __future__ import annotations

__all__ = ["InertHook"]


class InertHook:
    """A hook that does nothing. A copied or unpickled model is an ordinary model: no optimizer of the library steps it."""

    def __call__(self, *_: object) -> None:
        pass
