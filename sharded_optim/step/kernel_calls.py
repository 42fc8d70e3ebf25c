"""Group the parameters of a step into kernel calls: the same storage formats, algorithm and backend in each. Used by `ParamSet`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from sharded_optim.backends import EAGER, Backend, choose
from sharded_optim.sharding import Layout, LocalParam
from sharded_optim.step.coefficients import GroupValues
from sharded_optim.step.collection import collector_paused
from sharded_optim.step.kernel_call import KernelCall
from sharded_optim.step.matrix_call import MatrixCall
from sharded_optim.step.matrix_exchange import MatrixExchange
from sharded_optim.step.state import Choice
from sharded_optim.step.stateful import StatefulOptimizer
from sharded_optim.storage.format import Format
from sharded_optim.storage.formats import format_of

__all__ = ["BackendChoice", "kernel_calls"]

SLOW = 1_000_000  # elements above which a step without a compiled backend is worth a warning

logger = logging.getLogger(__name__)


class BackendChoice:
    """Chooses and caches a backend for each combination of device and dtypes that an optimizer steps.

    Args:
        names: names of the backends that may run, in order of preference.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._chosen: dict[tuple[torch.device, frozenset[torch.dtype]], Backend] = {}
        # The same, keyed by (device, dtype of the parameter, other dtypes in order), which is faster to build than a frozenset.
        self._by_dtypes: dict[tuple[Any, ...], Backend] = {}

    def __str__(self) -> str:
        running = {backend.name for backend in self._chosen.values()}
        return ", ".join(sorted(running)) or f"{' or '.join(self.names)}, chosen in the first step"

    def of(self, param: Tensor, dtypes: Sequence[torch.dtype], optimizer: str) -> Backend:
        """Return the backend that steps a parameter.

        Args:
            dtypes: dtypes of its gradient and state.
            optimizer: name of the optimizer, for the log.

        Raises:
            ValueError: no backend supports them.
        """
        exact = (param.device, param.dtype, *dtypes)
        if (known := self._by_dtypes.get(exact)) is not None:
            return known
        key = (param.device, frozenset((param.dtype, *dtypes)))
        if key not in self._chosen:
            self._chosen[key], declined = choose(self.names, *key)
            what = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in key[1]))
            why = f" ({'; '.join(declined)})" if declined else ""
            logger.info("%s steps %s on %s with the %s backend%s", optimizer, what, key[0], self._chosen[key].name, why)
        self._by_dtypes[exact] = self._chosen[key]
        return self._chosen[key]


def _adapted_to_state(choice: Choice, state: Mapping[str, Any], entry: LocalParam) -> Choice:
    """Adapt a choice to existing state: a single-array moment of another dtype is stored in the plain format of that dtype.

    Raises:
        ValueError: any other array has a dtype that differs from its format's.
    """
    if all(state[key].dtype == dtype for key, dtype in choice.entries.items()):
        return choice
    for name, dtype in choice.format.extra:
        if state[name].dtype != dtype:
            raise ValueError(
                f"{name!r} of {entry.name!r} has dtype {state[name].dtype}, but the format {choice.format.name!r} of a "
                f"{choice.format.dtype} parameter stores it in {dtype}; convert it"
            )
    formats: list[Format] = []
    for _, fmt, entries in choice.moments:
        others = {key: state[key].dtype for key, dtype in entries.items() if state[key].dtype != dtype}
        for key, dtype in others.items():
            if len(entries) > 1 or not dtype.is_floating_point:
                raise ValueError(
                    f"{key!r} of {entry.name!r} has dtype {dtype}, but the format {fmt.name!r} stores it in {entries[key]}; convert it"
                )
        formats.append(format_of(*others.values()) if others else fmt)
    return choice._replace(state_formats=tuple(formats))


@collector_paused()
def kernel_calls(
    optimizer: StatefulOptimizer,
    layout: Layout,
    groups: Sequence[GroupValues],  # param group of each of the layout's local parameters
    grads: Sequence[Tensor | None],  # gradient of each of them
    backends: BackendChoice,
    exchanges: Mapping[torch.dtype, MatrixExchange],  # the layout's exchanges, keyed by the dtype in which matrices are sent
    *,
    together: bool,  # whether a call steps as many parameters as possible, or one
) -> list[KernelCall]:
    """Build the kernel calls for the parameters that have a gradient, in the order of their units.

    Raises:
        ValueError: a gradient or state cannot be used.
    """
    units = {} if optimizer.layout is None else optimizer.layout.units
    rows: dict[tuple[Any, ...], list[tuple[int, LocalParam, GroupValues, Tensor]]] = {}
    choices: dict[tuple[Any, ...], tuple[Backend, Choice]] = {}
    chosen: dict[tuple[int, torch.dtype], Choice] = {}  # keyed by (id(group), dtype of the parameter)
    for index, (entry, values, grad) in enumerate(zip(layout.local_params, groups, grads, strict=True)):
        if grad is None or not entry.pieces:
            continue
        group = id(values.group), entry.param.dtype
        if group not in chosen:
            chosen[group] = optimizer.choice_of(entry.param, values.group)
        state = optimizer.complete_state(entry.param, chosen[group], entry.name)
        choice = _adapted_to_state(chosen[group], state, entry)
        dtypes = (grad.dtype, *(state[name].dtype for name in choice.algorithm.state))
        backend = backends.of(entry.param, dtypes, type(optimizer).__name__)
        alone = None if together else id(entry.param)
        key = (units.get(entry.param, 0), entry.param.device, backend.name, choice.algorithm.name, choice[1:], grad.dtype, alone)
        choices[key] = backend, choice
        rows.setdefault(key, []).append((index, entry, values, grad))
    if "cpu" in backends.names:
        _warn_if_slow([(entry, *choices[key]) for key, members in rows.items() for _, entry, _, _ in members])
    calls = []
    for key in sorted(rows, key=itemgetter(0)):
        arguments = (optimizer, layout, *choices[key], rows[key], key[0])
        of_matrices = choices[key][1].algorithm.matrix is not None
        calls.append(MatrixCall(*arguments, exchanges=exchanges) if of_matrices else KernelCall(*arguments))
    return calls


def _warn_if_slow(stepped: Sequence[tuple[LocalParam, Backend, Choice]]) -> None:
    """Warn if many elements are stepped on the CPU without llvmlite, which compiles the step."""
    slow = sum(
        piece.segment.numel
        for entry, backend, _ in stepped
        if entry.param.device.type == "cpu" and backend.name == EAGER
        for piece in entry.pieces
    )
    if slow > SLOW:
        warnings.warn(
            "more than a million elements are stepped on the CPU by separate torch operations, which takes many times as long as the "
            "compiled step: pip install llvmlite. backend='eager' selects this without a warning",
            UserWarning,
            stacklevel=2,
        )
