"""The optimizer layer above param groups: state, allocated on first access, and state dicts. Base of `ReportingOptimizer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sharded_optim.step import foreign_state, param_groups, state_dicts
from sharded_optim.step.compensation import CompensationLog
from sharded_optim.step.grouped import GroupedOptimizer, optimizer_classes
from sharded_optim.step.options import Params
from sharded_optim.step.state import (
    STEP,
    Choice,
    State,
    asked_by_fsdp1,
    asked_for_state_of_fsdp1,
    new_state,
    zeros,
)
from sharded_optim.storage.format import Format
from sharded_optim.storage.formats import chosen_format, extra_arrays, param_format

__all__ = ["StatefulOptimizer"]


class StatefulOptimizer(GroupedOptimizer):
    """A torch optimizer with state but without a step; its arguments are those of `GroupedOptimizer`."""

    gradient_release = False  # whether steps happen inside backward, after which step() may find no gradient

    def __init__(self, params: Params, defaults: dict[str, Any], **options: Any) -> None:
        self.compensation_log = CompensationLog()
        self._choices: dict[tuple[int, Format, Format], Choice] = {}  # keyed by (id(algorithm), parameter format, moment format)
        super().__init__(params, defaults, **options)
        self.state = State(self, self.state)

    def init_state(self) -> None:
        """Allocate the state of every trainable parameter that has none yet, as the first step does for parameters with a gradient."""
        for index, group in enumerate(self.param_groups):
            for param, name in param_groups.named_params(group, index):
                if param.requires_grad:
                    self.complete_state(param, self.choice_of(param, group), name)

    def zero_grad(self, set_to_none: bool = True, param: Tensor | None = None) -> None:
        """Reset the gradients of all parameters, or of one, as torch does."""
        if param is None:
            super().zero_grad(set_to_none)
        elif set_to_none:
            param.grad = None
        elif param.grad is not None:
            param.grad = torch.zeros_like(param.grad)

    def new_state(self, param: Tensor) -> dict[str, Any]:
        """Create the state of a parameter, for `self.state`."""
        return new_state(param, self.choice_of(param, self._group_with(param) or self.param_groups[0]).entries)

    def complete_state(self, param: Tensor, choice: Choice, name: str) -> dict[str, Any]:
        """Return the parameter's state, after adding the arrays that the algorithm and the format need.

        Raises:
            ValueError: an array is missing that cannot start as zeros at this step.
        """
        if not self.state.get(param):  # like torch's optimizers, treat empty state as no state
            self.state[param] = state = new_state(param, choice.entries)
            return state
        state = self.state[param]
        if STEP not in state:
            raise ValueError(f"the state of {name!r} lacks {STEP!r} (it has {', '.join(map(str, state))}); delete it, or load a full state")
        for key in extra_arrays() & state.keys() - choice.entries.keys():
            del state[key]  # the coming step changes the parameter without updating it
        may_begin = choice.may_begin(state.keys())
        for key, dtype in choice.entries.items():
            if key not in state:
                if key not in may_begin and state[STEP] > 0:
                    raise ValueError(
                        f"the state of {name!r} lacks {key!r} after {int(state[STEP])} steps, and it cannot begin late; load a full state, "
                        f"or set at construction the option that needs it"
                    )
                state[key] = zeros(param, dtype)
        return state

    @property
    def state_format(self) -> Format:
        """The storage format of the moments."""
        return chosen_format(self.state_dtype)

    def choice_of(self, param: Tensor, group: Mapping[str, Any]) -> Choice:
        """Choose the algorithm and formats of a parameter by the options of its param group."""
        algorithm = self._choose(group)
        fmt = param_format(param.dtype, kahan_sum=group["kahan_sum"], stochastic_rounding=group["stochastic_rounding"])
        state_format = self.state_format
        key = id(algorithm), fmt, state_format
        if key not in self._choices:  # many parameters share a choice, and its cached properties
            self._choices[key] = Choice(algorithm, fmt, (state_format,) * len(algorithm.state))
        return self._choices[key]

    # ------------------------------------------------------------------------------------------------------------- state dicts

    def drop_stale_compensation(self) -> None:
        """Zero the Kahan compensations of parameters that were modified since the last step."""
        names = extra_arrays()
        rows = [(param, state[key]) for param, state in self.state.items() for key in names & state.keys()]
        self.compensation_log.drop_stale([param for param, _ in rows], [compensation for _, compensation in rows])

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict, in torch's form.

        Raises:
            ValueError: torch gathers state for FullyShardedDataParallel that it would fail on, or whose moments it would mix up.
        """
        if not self.state and asked_by_fsdp1():
            self.init_state()
        asked = asked_for_state_of_fsdp1()
        if asked is not None:
            from sharded_optim.sharding import fsdp1

            fsdp1.check_state_is_alike(
                asked.model,
                {param: sorted(self.choice_of(param, group).entries) for group in self.param_groups for param in group["params"]},
            )
            if asked.offloads_whole:
                fsdp1.check_whole_state_on_cpu(asked.model, sorted({key for state in self.state.values() for key in state} - {STEP}))
        self.drop_stale_compensation()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, all or nothing. Moments are stored in `state_dtype`; group keys that the saved state lacks are kept.

        State of torch's Adam, AdamW and SGD, of Composer's and of optimi's optimizers is recognised and continued; see `foreign_state.py`.

        Raises:
            ValueError: the saved state does not fit; nothing was changed.
        """
        saved = dict(state_dict)
        for convert in self._optimizer_load_state_dict_pre_hooks.values():
            converted = convert(self, saved)
            saved = saved if converted is None else converted
        state_dicts.check_sizes(self.param_groups, saved)
        saved = foreign_state.translate(saved, self.param_groups, replaces_composer=self.replaces_composer)
        groups = state_dicts.merged_groups(self.param_groups, saved["param_groups"])
        for index, group in enumerate(groups):
            self.checks.check(group, f"the state dict's param_groups[{index}]", self.state_dtype, scheduled=True)
        moments = {name for optimizer in optimizer_classes() for algorithm in optimizer.algorithms.values() for name in algorithm.state}
        state_dicts.check_state(groups, saved, self.choice_of, moments)
        state_dicts.check_family(saved, self.checks.foreign)
        self.state.clear()  # all checks have passed; free this memory before the loaded state is allocated
        state = state_dicts.loaded_state(groups, saved, self.choice_of)
        given = [(index, each) for each in self._given for index, group in enumerate(self.param_groups) if group is each.group]
        self.__setstate__({"state": state, "param_groups": groups})
        self._given = [each._replace(group=groups[index]) for index, each in given]
        for look in self._optimizer_load_state_dict_post_hooks.values():
            look(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.state = State(self, self.state)  # torch replaces it by a plain dict on loading
        if "_choose" in state:  # unpickled or copied; torch also calls this with the loaded state and groups alone
            self.compensation_log = CompensationLog()
            self._choices = {}
