"""Build the layouts of an optimizer's parameters, for this rank alone or for all ranks. Used by `ParamSets`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor

from sharded_optim.sharding import Layout, LocalParam
from sharded_optim.sharding.exchange import exchange_layouts
from sharded_optim.step.agreement import Rules, confirm_replacement
from sharded_optim.step.collection import collector_paused
from sharded_optim.step.param_index import ParamIndex
from sharded_optim.step.stateful import StatefulOptimizer

__all__ = ["LayoutMaker"]

SHOWN = 3  # parameter names in an error message


class LayoutMaker:
    """Builds layouts, and records the parameters whose values the ranks have compared.

    Replicas are compared once only: later, nondeterministic kernels may have made their last bits drift apart.

    Args:
        index: looks up the param groups of parameters.
    """

    def __init__(self, index: ParamIndex) -> None:
        self._index = index
        self._compared: dict[int, Tensor] = {}  # parameters whose values were compared, keyed by id(param)
        self._compared_over: weakref.ref[dist.ProcessGroup] | None = None  # the ranks that compared them

    @collector_paused()
    def make(
        self,
        optimizer: StatefulOptimizer,
        params: Sequence[Tensor],
        rules: Rules,
        process_group: dist.ProcessGroup | None,
        before: Layout | None,
    ) -> Layout:
        """Build a layout. A collective if `rules.agrees`.

        Args:
            before: the layout to replace, which other ranks may still be stepping; None if there is none.

        Raises:
            ValueError: the ranks' parameters are inconsistent, or have changed on some ranks only. Raised on all ranks.
        """
        if process_group is not None and before is not None and before.is_global_over(process_group):
            device = params[0].device if params else before.device
            confirm_replacement(before, self._describe_change(optimizer, params, before), rules, device)
        if rules.agrees:
            return self.of_all_ranks(optimizer, params, process_group)
        with collector_paused():
            return Layout.of_rank(self._described(optimizer, params))

    @collector_paused()
    def of_all_ranks(self, optimizer: StatefulOptimizer, params: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> Layout:
        """Build the layout of all ranks' parameters. A collective."""
        over = None if process_group is None else weakref.ref(process_group)
        if over != self._compared_over:
            self._compared.clear()
            self._compared_over = over
        layout = exchange_layouts(
            partial(self._described, optimizer, params),
            process_group,
            compares_values=lambda param: id(param) not in self._compared,
        )
        self._compared |= {id(param): param for param in params}
        return layout

    def keep(self, is_used: Callable[[Tensor], bool]) -> None:
        """Release the references to parameters that are no longer used."""
        self._compared = {key: param for key, param in self._compared.items() if is_used(param)}

    @collector_paused()
    def _described(self, optimizer: StatefulOptimizer, params: Sequence[Tensor]) -> list[LocalParam]:
        if not params:
            raise ValueError(
                "the optimizer's param groups are empty, as DeepSpeed's ZeRO stage 3 leaves them between steps; step through the wrapper"
            )
        positions = zip(params, self._index.places_of(optimizer.param_groups, params), strict=True)
        return [optimizer.describe_param(param, place.name, place.group) for param, place in positions]

    def _describe_change(self, optimizer: StatefulOptimizer, params: Sequence[Tensor], layout: Layout) -> str:
        """Return how parameters differ from those of a layout, as text for an error message."""
        before, now = set(map(id, layout.params)), set(map(id, params))
        if added := [param for param in params if id(param) not in before]:
            names = [place.name for place in self._index.places_of(optimizer.param_groups, added)]
            return f"{len(added)} new ones, {', '.join(map(repr, names[:SHOWN]))}{', ...' if len(names) > SHOWN else ''}"
        if gone := [entry.name for entry in layout.local_params if id(entry.param) not in now]:
            return f"without {len(gone)}, {', '.join(map(repr, gone[:SHOWN]))}{', ...' if len(gone) > SHOWN else ''}"
        return "the same in another order, or of other shapes, dtypes, devices or placements"
