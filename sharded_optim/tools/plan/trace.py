"""Count operations and activations of a language model's forward and backward on torch's meta device, which computes and allocates nothing.

A step is run as in training: tokens (batch, sequence) go in, logits (batch, sequence, vocabulary) come out, and their cross-entropy in fp32
goes back. The parameters have the dtype of a forward in mixed precision; gradients are dropped as soon as they are complete.

On the meta device torch's attention would keep the matrix of all scores. It is replaced by the fused kernels of GPUs, which keep query,
key, value, result, and one fp32 number for each row.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry

from sharded_optim.tools.shapes import block_of, of_plain_sequences

__all__ = ["CHECKPOINTING", "Trace", "trace"]

aten: Any = torch.ops.aten
CHECKPOINTING = ("none", "selective", "full")
ATTENTION = (aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention)
PRODUCTS = (aten.mm, aten.addmm)  # products with a weight; selective checkpointing keeps the result of every second one

GROUPED = ("_grouped_mm", "_scaled_grouped_mm")  # products of experts


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Operations of a step, and its memory besides parameters and gradients."""

    tokens: int
    attention: int  # FLOPs of fused attention in forward, without regard to masks
    flops: int  # FLOPs of products and attention in forward and backward, recomputation included
    activations: int  # peak bytes
    looked_up: int  # elements of embeddings that are only looked up, and not multiplied with
    uncounted: frozenset[str]  # products of matrices for whose FLOPs torch has no formula


def trace(
    module: nn.Module,  # on the meta device; not changed
    *,
    batch: int,  # sequences
    sequence_length: int,
    dtype: torch.dtype,  # dtype of the parameters
    checkpointing: str,  # one of CHECKPOINTING, applied to every numbered block
) -> Trace:
    """Count the operations and activations of a step on the meta device.

    Raises:
        ValueError: the module cannot run on the meta device, does not map tokens to logits, or has no numbered blocks to checkpoint.
    """
    module = deepcopy(module)
    for param in module.parameters():
        param.data = param.data.to(dtype)
        param.register_post_accumulate_grad_hook(_drop_gradient)
    if checkpointing != "none":
        _checkpoint_blocks(module, selective=checkpointing == "selective")
    watch = _Watch([*module.parameters(), *module.buffers()])
    try:
        fused = mock.patch.object(functional, "scaled_dot_product_attention", _fused_attention)
        with torch.device("meta"), fused, of_plain_sequences():
            tokens = torch.zeros(batch, sequence_length, dtype=torch.int64)
            with watch:
                logits = module(tokens)
                logits = getattr(logits, "logits", logits)
                in_forward = watch.attention
                if not isinstance(logits, Tensor) or logits.shape[:2] != tokens.shape or logits.dim() != 3:
                    raise TypeError(f"its forward returned {_described(logits)}")
                loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
                del logits
                loss.backward()
    except Exception as error:  # whatever a model's forward may raise
        raise ValueError(
            f"the model's forward and backward cannot be run on the meta device ({type(error).__name__}: {error}); it must take tokens "
            "(batch, sequence) and return logits (batch, sequence, vocabulary), or an object with them as `logits`"
        ) from error
    embeddings = {id(each.weight): each.weight for each in module.modules() if isinstance(each, nn.Embedding)}
    looked_up = sum(weight.numel() for weight in embeddings.values() if weight.untyped_storage()._cdata not in watch.multiplied)
    return Trace(
        tokens=batch * sequence_length,
        attention=in_forward,
        flops=watch.flops,
        activations=watch.peak,
        looked_up=looked_up,
        uncounted=frozenset(watch.uncounted),
    )


def _described(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _drop_gradient(param: Tensor) -> None:
    param.grad = None


class _Watch(TorchDispatchMode):
    """Counts FLOPs, and the bytes of the live tensors that operations have made."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}  # parameters and buffers, which are no activations
        self._live: dict[int, weakref.ref[Any]] = {}
        self._bytes = 0
        self.peak = 0
        self.flops = 0
        self.attention = 0
        self.uncounted: set[str] = set()
        self.multiplied: set[int] = set()  # storages of operands of products

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            flops = formula(*args, **kwargs, out_val=result)
            self.flops += flops
            self.attention += flops if func.overloadpacket in ATTENTION else 0
            self.multiplied.update(tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, Tensor))
        elif func.overloadpacket.__name__ in GROUPED:
            self.uncounted.add(func.overloadpacket.__name__)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self._bytes)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live and key not in self._known:
            size = storage.nbytes()
            self._bytes += size
            self._live[key] = weakref.ref(storage, partial(self._remove, key, size))

    def _remove(self, key: int, size: int, _: Any) -> None:
        self._bytes -= size
        del self._live[key]


# ---------------------------------------------------------------------------------------------------------------- fused attention


def _fused_attention(
    query: Tensor,  # (..., heads, rows, width)
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stand in for `scaled_dot_product_attention` on a GPU: by flash attention or, with a mask, memory-efficient attention."""
    leading = query.shape[:-3]
    query, key, value = (each.reshape(-1, *each.shape[-3:]) for each in (query, key, value))
    if attn_mask is None:
        result = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    else:
        if enable_gqa:
            key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
        result = aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
    return result.reshape(*leading, *result.shape[1:])


# ------------------------------------------------------------------------------------------------------- activation checkpointing


def _checkpoint_blocks(module: nn.Module, *, selective: bool) -> None:
    """Make every numbered block keep only its inputs (selective: also results of some operations) and recompute the rest in backward."""
    blocks = {block_of(name) for name, _ in module.named_parameters()} - {""}
    if not blocks:
        raise ValueError("activation checkpointing is of numbered blocks, as layers.0, and the model has none; leave --checkpointing out")
    options: dict[str, Any] = {"context_fn": _selective_contexts} if selective else {}
    for name in blocks:
        block = module.get_submodule(name.removesuffix("."))
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **options)


def _selective_contexts() -> Any:
    """Keep the results of attention and of products 1, 3, 5 and so on, as torchtitan's selective checkpointing by operation does."""
    products = 0

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        nonlocal products
        kept = operation.overloadpacket in ATTENTION
        if operation.overloadpacket in PRODUCTS:
            products += 1
            kept = products % 2 == 1
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
