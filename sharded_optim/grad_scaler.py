"""What GradScaler has told an optimizer before a step. Read here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Scaler"]


@dataclass(frozen=True)
class Scaler:
    """Attributes that GradScaler sets on an optimizer for the time of a step."""

    scale: Tensor | None = None  # what the gradients are multiplied by, one element
    found_inf: Tensor | None = None  # not 0 if a gradient was not finite, one element

    @classmethod
    def of(cls, optimizer: Any) -> Scaler:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and not isinstance(found_inf, Tensor):  # of a rank without a gradient
            found_inf = torch.tensor(float(found_inf), device="cpu")
        return cls(getattr(optimizer, "grad_scale", None), found_inf)

    def inverse(self, device: torch.device) -> Tensor | None:
        """What a step multiplies the gradients by: fp32 () on the device; None where they are not scaled."""
        return None if self.scale is None else self.scale.to(device).double().reciprocal().float().reshape(())
