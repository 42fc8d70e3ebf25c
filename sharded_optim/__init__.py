"""Sharded optimizers for PyTorch that give the same parameters, bit for bit, however the model is sharded. The public API."""

from sharded_optim import checkpoint, deepspeed, optimizers, trackers
from sharded_optim.optimizers import *  # noqa: F403
from sharded_optim.optimizers.convert_weight_decay import convert_weight_decay
from sharded_optim.sharding import fsdp1_layout
from sharded_optim.tools.divergence import DivergenceCheck, DivergenceError
from sharded_optim.tools.verify import verify
from sharded_optim.training import callbacks
from sharded_optim.training.clipping import clip_grad_norm_
from sharded_optim.training.containers import metrics, unwrap_optimizer
from sharded_optim.training.gradient_release import prepare_for_gradient_release, remove_gradient_release
from sharded_optim.training.model_preparation import param_groups_weight_decay, to_low_precision
from sharded_optim.training.muon_groups import muon_param_groups
from sharded_optim.version import __version__
from sharded_optim.zero import ShardedOptimizer

__all__ = [
    "DivergenceCheck",
    "DivergenceError",
    "ShardedOptimizer",
    "__version__",
    "callbacks",
    "checkpoint",
    "clip_grad_norm_",
    "convert_weight_decay",
    "deepspeed",
    "fsdp1_layout",
    "metrics",
    "muon_param_groups",
    "param_groups_weight_decay",
    "prepare_for_gradient_release",
    "remove_gradient_release",
    "to_low_precision",
    "trackers",
    "unwrap_optimizer",
    "verify",
]
__all__ += optimizers.__all__
