import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmtool.errors import DataError
from cmtool.training.batches import batch_indices, flip_mask


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 3))
def test_every_image_once_per_epoch_across_batch_borders(size, batch, seed):
    steps = -(-3 * size // batch)
    order = torch.cat([batch_indices(seed, step, batch, size) for step in range(steps)])
    for epoch in range(3):
        assert sorted(order[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


def test_order_needs_no_memory():
    late = batch_indices(5, 1000, 64, 1797)
    for step in range(3):
        batch_indices(5, step, 64, 1797)
    assert torch.equal(late, batch_indices(5, 1000, 64, 1797))
    assert not torch.equal(late, batch_indices(6, 1000, 64, 1797))
    assert not torch.equal(batch_indices(0, 0, 50, 50), batch_indices(0, 1, 50, 50))


def test_order_of_a_step_scales_with_the_batch():
    whole = torch.cat([batch_indices(1, step, 8, 100) for step in range(6)])
    assert torch.equal(whole, torch.cat([batch_indices(1, step, 16, 100) for step in range(3)]))
    with pytest.raises(DataError, match="empty"):
        batch_indices(0, 0, 4, 0)


def test_flips_are_fair_and_a_function_of_the_step():
    flips = torch.stack([flip_mask(0, step, 64) for step in range(100)])
    assert flips.dtype == torch.bool and abs(flips.float().mean() - 0.5) < 0.02
    assert torch.equal(flips[7], flip_mask(0, 7, 64)) and not torch.equal(flips[7], flip_mask(1, 7, 64))
