"""Optimizers that give the same answer however you shard them."""

from sharded_optim.optimizers import AdamW, DecoupledAdamW, StableAdamW

__all__ = ["AdamW", "DecoupledAdamW", "StableAdamW"]
__version__ = "0.1.0"
