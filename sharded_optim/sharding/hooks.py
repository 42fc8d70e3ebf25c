"""What copies of a model have in the place of hooks that hold an optimizer's objects. Used by those who register hooks on models."""

from __future__ import annotations

__all__ = ["InertHook"]


class InertHook:
    """A hook that does nothing. A copied or unpickled model is an ordinary model: no optimizer of the library steps it."""

    def __call__(self, *_: object) -> None:
        pass
