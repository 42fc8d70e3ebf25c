"""The model predicts the next byte from the bytes before it, and starts close to knowing nothing."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from launch.model import GPT, rotary_table, rotate

TOKENS = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0))


def small(layers: int = 2) -> GPT:
    torch.manual_seed(0)
    return GPT(layers=layers, heads=2, d_model=16, sequence_length=16)


@pytest.mark.parametrize("layers", [1, 12])
def test_the_first_logits_have_unit_variance_at_any_depth(layers):
    """So the first loss is 8 bits per byte and the 0.7 that random logits cost."""
    logits = small(layers)(TOKENS)
    assert logits.shape == (3, 16, 256)
    assert logits.std().item() == pytest.approx(1.0, abs=0.15)


def test_a_prediction_does_not_see_what_comes_after():
    model = small()
    changed = TOKENS.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 256
    difference = (model(TOKENS) - model(changed)).abs().amax(dim=(0, 2))
    assert (difference[:10] == 0).all()
    assert (difference[10:] > 1e-4).all()


def test_every_parameter_learns_from_the_first_step():
    model = small()
    F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    assert all(param.grad is not None and param.grad.abs().sum() > 0 for param in model.parameters())


def test_attention_sees_distances_not_positions():
    """Rotary positions: the product of a rotated query and key depends on how far apart they are, so the diagonals are constant."""
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).double()
    table = rotary_table(12, 8).double()
    products = rotate(query.expand(12, 8), table) @ rotate(key.expand(12, 8), table).T
    for distance in range(-11, 12):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert products.diagonal(0)[0] != products.diagonal(3)[0]


def test_weights_in_bfloat16_compute_in_bfloat16():
    """DeepSpeed casts parameters, and leaves the table of rotations in float32."""
    model = small()
    expected = model(TOKENS)
    for param in model.parameters():
        param.data = param.data.bfloat16()
    assert model.rotary.dtype == torch.float32
    logits = model(TOKENS)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.0, atol=0.1)
