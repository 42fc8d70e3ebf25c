"""Complete the signatures and docstrings of the public optimizers, so that `help` and editors show every option."""

from __future__ import annotations

import functools
import inspect
import re
from types import FunctionType
from typing import Any, TypeVar

from sharded_optim.step.engine import Engine
from sharded_optim.step.options import CommonOptions, EngineOptions, SwitchOptions

__all__ = ["OPTION_TEXTS", "spelled_out"]

Class = TypeVar("Class", bound=type[Engine])

ENTRY = re.compile(r"^(\w+): (.*(?:\n    .*)*)", re.MULTILINE)
OPTION_TEXTS: dict[str, str] = {  # by option name; taken from the docstrings of these types
    name: text
    for options in (SwitchOptions, EngineOptions, CommonOptions)
    for name, text in ENTRY.findall(inspect.cleandoc(options.__doc__ or ""))
}


def _own_constructor(optimizer: type[Engine]) -> Any:
    """Return a copy of the constructor, named after the public class: Python's errors about arguments then show that name."""
    given: Any = optimizer.__init__
    init = FunctionType(given.__code__, given.__globals__, given.__name__, given.__defaults__, given.__closure__)
    functools.update_wrapper(init, given)
    del init.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]  # else `inspect` would show that function's signature
    init.__kwdefaults__, init.__qualname__ = given.__kwdefaults__, optimizer.__name__
    optimizer.__init__ = init
    return init


def spelled_out(optimizer: Class) -> Class:
    """Class decorator: replace `**options` in a signature by all options, and add their texts to the docstring."""
    init = _own_constructor(optimizer)
    of_engine = inspect.signature(Engine).parameters
    own = [each for each in inspect.signature(init).parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    missing = OPTION_TEXTS.keys() - {each.name for each in own}
    init.__signature__ = inspect.Signature([*own, *[of_engine[name] for name in OPTION_TEXTS if name in missing]])  # pyright: ignore
    entries = "".join(f"{name}: {text}\n" for name, text in OPTION_TEXTS.items())
    indented = "".join(f"    {line}\n" for line in entries.splitlines())
    optimizer.__doc__ = re.sub(
        r"^    (\w+, )*options: .*\n", lambda _: indented, inspect.cleandoc(optimizer.__doc__ or ""), flags=re.MULTILINE
    )
    return optimizer
