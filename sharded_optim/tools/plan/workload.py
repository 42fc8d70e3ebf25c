"""FLOPs and activations of forward and backward, the same for any sharding: given as numbers, or counted on the meta device by `trace.py`.

Model FLOPs are counted as in torchtitan and PaLM (appendix B), without recomputation:

    6 * (parameters that a token is multiplied with) + 12 * layers * heads * head_dim * sequence_length

for each token. 6 is 2, for a multiplication and an addition, once in forward and twice in backward. Attention is counted as two products of
whole matrices, without regard to causal or sliding masks. Embeddings that are only looked up do not count as multiplied with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from sharded_optim.storage.formats import FORMATS
from sharded_optim.tools.plan.setup import Setup, one_of
from sharded_optim.tools.plan.trace import CHECKPOINTING, Trace, trace
from sharded_optim.tools.shapes import Model

__all__ = ["Attention", "Workload", "measure"]

BACKWARD = 3  # forward and backward take as much as three forwards


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention of a model whose layers are all alike."""

    layers: int
    heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.head_dim) < 1:
            raise ValueError(
                f"attention has at least 1 layer, head and element of a head, got {self.layers}, {self.heads} and {self.head_dim}"
            )

    def flops(self, sequence_length: int) -> int:
        """Return the FLOPs for each token, in forward and backward."""
        return 12 * self.layers * self.heads * self.head_dim * sequence_length


@dataclass(frozen=True, kw_only=True)
class Workload:
    """FLOPs and activations of forward and backward on a rank; an unknown value is None, with a reason in `unknown`."""

    parameters: int  # FLOPs for each token of products with parameters
    attention: int | None = None  # FLOPs for each token of attention between tokens
    recomputed: int | None = 0  # FLOPs for each token that activation checkpointing adds
    activations: int | None = None  # peak bytes
    unknown: Mapping[str, str] = field(default_factory=dict)  # reasons, and remedies, by the name of the unknown value

    @property
    def model_flops(self) -> int | None:
        """FLOPs for each token, as MFU counts them; None if those of attention are unknown."""
        return None if self.attention is None else self.parameters + self.attention

    @property
    def known_flops(self) -> int:
        """Known FLOPs for each token, recomputation included: a lower bound."""
        return self.parameters + (self.attention or 0) + (self.recomputed or 0)


def measure(
    model: Model,
    setup: Setup,
    *,
    tokens: int | None = None,  # tokens of a rank in a step
    sequence_length: int | None = None,
    attention: Attention | None = None,  # None: counted from the module
    checkpointing: str = "none",
    activations: int | Literal["profile"] | None = None,  # bytes; "profile": counted on the meta device
) -> Workload:
    """Count the FLOPs and activations of forward and backward, as far as they can be known.

    Raises:
        ValueError: arguments contradict each other, or a profile is asked for and the model cannot be profiled.
    """
    one_of("checkpointing", checkpointing, CHECKPOINTING)
    _check(tokens, sequence_length, attention, activations)
    plain, chosen, reason = _traces(model, setup, tokens, sequence_length, checkpointing)
    unknown: dict[str, str] = {}
    attention_flops = recomputed = None
    if attention is not None and sequence_length is not None:
        attention_flops = attention.flops(sequence_length)
    elif plain is not None and plain.attention:
        attention_flops = BACKWARD * plain.attention // plain.tokens
    else:
        reason_of_attention = reason if plain is None else "the forward does not call torch.nn.functional.scaled_dot_product_attention"
        unknown["attention"] = f"{reason_of_attention}; give the sequence length, and layers, heads and head_dim"
    if plain is None:
        unknown["embeddings"] = f"{reason}; all parameters are counted as multiplied with"
    if checkpointing == "none":
        recomputed = 0
    elif plain is not None and chosen is not None and chosen.uncounted:
        unknown["recomputed"] = f"operations of {', '.join(sorted(chosen.uncounted))} are not counted"
    elif plain is not None and chosen is not None:
        recomputed = (chosen.flops - plain.flops) // plain.tokens
    else:
        unknown["recomputed"] = reason
    if activations == "profile":
        if chosen is None or tokens is None:
            raise ValueError(f"activations cannot be profiled: {reason if chosen is None else 'the tokens of a step are not given'}")
        activations = chosen.activations
    elif activations is None:
        unknown["activations"] = "not given, so that no total has them; give a number, or 'profile'"
    return Workload(
        parameters=6 * (model.numel - model.idle - (plain.looked_up if plain else 0)),
        attention=attention_flops,
        recomputed=recomputed,
        activations=activations,
        unknown=unknown,
    )


def _traces(
    model: Model, setup: Setup, tokens: int | None, sequence_length: int | None, checkpointing: str
) -> tuple[Trace | None, Trace | None, str]:
    """Return the traces of a step without activation checkpointing and with it, None for one that cannot run; and the reason."""
    if sequence_length is None:
        return None, None, "the sequence length is not given"
    if model.module is None:
        return None, None, "a list of shapes does not say how the model computes"
    batch = (tokens or sequence_length) // sequence_length
    run = partial(trace, model.module, batch=batch, sequence_length=sequence_length, dtype=FORMATS[setup.dtype].dtype)
    plain = None
    try:
        plain = run(checkpointing="none")
        return plain, plain if checkpointing == "none" else run(checkpointing=checkpointing), ""
    except ValueError as error:
        return plain, None, str(error)


def _check(tokens: int | None, sequence_length: int | None, attention: Attention | None, activations: int | str | None) -> None:
    """Raise a ValueError for values that are out of range or contradict each other."""
    for name, value in (("sequence", sequence_length), ("step", tokens)):
        if value is not None and value < 1:
            raise ValueError(f"a {name} has at least 1 token, got {value}")
    if tokens is not None and sequence_length is not None and tokens % sequence_length:
        raise ValueError(f"a step of a rank has whole sequences, got {tokens} tokens in sequences of {sequence_length}")
    if attention is not None and sequence_length is None:
        raise ValueError("operations of attention depend on the sequence length, which is not given; give it too")
    if isinstance(activations, str) and activations != "profile":
        raise ValueError(f"activations are bytes or 'profile', got {activations!r}")
    if isinstance(activations, int) and activations < 0:
        raise ValueError(f"activations are at least 0 bytes, got {activations}")
