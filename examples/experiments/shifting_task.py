"""A classification task whose inputs change during training, and a small vision transformer for it. `spikes.py` trains on it.

An example is a sequence of patches of a class's random prototype under noise, in `signal_channels` channels. The other channels come in
groups that are zero at first. At step `first_shift + k * period` group k begins to carry one number per example, its brightness: the same
in every channel and patch, and without information about the class. From then on a part of the patch embedding gets gradients for which its
second moment is 0, and the gradients of all its columns agree, so that large updates of single weights add up in the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

__all__ = ["PATCH_EMBEDDING", "Batches", "Task", "Transformer"]

PATCH_EMBEDDING = "patch_embedding.weight"  # the parameter that shifts concern first, as in the paper


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sizes of data and model, and when the data changes."""

    steps: int = 700
    batch: int = 64
    classes: int = 16
    outputs: int = 16  # of the classifier; those beyond `classes` are never right, and make the model larger
    patches: int = 8
    signal_channels: int = 64
    groups: int = 4
    group_channels: int = 64
    prototype_scale: float = 0.5  # standard deviation; that of the noise is 1
    brightness: float = 1.0  # scale of the absolute normal numbers in a group
    first_shift: int = 200
    period: int = 100
    measured_from: int = 100  # spikes before it, of warm-up, do not count
    width: int = 32  # of the model
    heads: int = 4
    blocks: int = 2
    label_smoothing: float = 0.1  # keeps gradients from vanishing once all examples are right

    @property
    def channels(self) -> int:
        return self.signal_channels + self.groups * self.group_channels

    @property
    def shifts(self) -> list[int]:
        """Steps at which a group begins to vary."""
        return [self.first_shift + group * self.period for group in range(self.groups)]


class Batches:
    """The batches of a task in order, the same for every optimizer that is given the same seed."""

    def __init__(self, task: Task, seed: int) -> None:
        self._task = task
        self._generator = torch.Generator().manual_seed(seed)
        self._prototypes = task.prototype_scale * self._normal(task.classes, task.patches, task.signal_channels)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs (batch, patches, channels) and classes (batch,) of a step."""
        task = self._task
        classes = torch.randint(task.classes, (task.batch,), generator=self._generator)
        signal = self._prototypes[classes] + self._normal(task.batch, task.patches, task.signal_channels)
        brightness = task.brightness * self._normal(task.batch, 1, 1).abs()
        varies = torch.tensor([float(step >= shift) for shift in task.shifts]).repeat_interleave(task.group_channels)
        return torch.cat([signal, (brightness * varies).expand(-1, task.patches, -1)], dim=2), classes


class Block(nn.Module):
    """Attention and a multilayer perceptron, each after a LayerNorm and with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, patches, width = hidden.shape
        mixed = self.query_key_value(self.attention_norm(hidden)).view(batch, patches, 3, self.heads, width // self.heads)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden = hidden + self.attention_out(attended)
        return hidden + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(hidden))))


class Transformer(nn.Module):
    """A vision transformer without a class token: the mean of the patches is classified."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(task.channels, task.width)
        self.position_embedding = nn.Parameter(0.02 * torch.randn(task.patches, task.width))
        self.blocks = nn.Sequential(*(Block(task.width, task.heads) for _ in range(task.blocks)))
        self.norm, self.head = nn.LayerNorm(task.width), nn.Linear(task.width, task.outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.blocks(self.patch_embedding(inputs) + self.position_embedding)
        return self.head(self.norm(hidden).mean(1))
