"""Windows: they cover, they agree with the model itself, and they leave no seam."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmtool.samplers.editing import edit, known_patch_means
from cmtool.samplers.windows import Windowed, positions, taper
from tests.samplers.oracle import GaussianConsistency, streams


@given(st.integers(8, 200), st.integers(2, 32), st.floats(0.0, 0.8))
@settings(max_examples=80, deadline=None)
def test_windows_cover_evenly_and_overlap_as_asked(length, window, overlap):
    if window > length:
        return
    starts = positions(length, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == length - window
    strides = [b - a for a, b in itertools.pairwise(starts)]
    assert all(1 <= stride <= max(1, math.floor(window * (1 - overlap))) for stride in strides)
    assert max(strides, default=0) - min(strides, default=0) <= 1


def test_a_picture_smaller_than_a_window_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        positions(7, 8)


def test_the_weights_never_vanish():
    weights = taper(8, torch.zeros(1))
    assert weights.min() > 0
    torch.testing.assert_close(weights, weights.flip(0).T)


def test_a_model_that_sees_single_pixels_is_the_same_in_windows():
    model = GaussianConsistency(shape=(3, 8, 8))
    x, t = torch.randn(2, 3, 19, 30, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.7)
    torch.testing.assert_close(Windowed(model, (3, 19, 30), batch_size=5)(x, t), model(x, t))


def test_at_its_own_size_it_is_the_model():
    model = GaussianConsistency(shape=(3, 8, 8))
    x, t = torch.randn(2, 3, 8, 8), torch.full((2,), 0.7)
    assert torch.equal(Windowed(model, (3, 8, 8))(x, t), model(x, t))
    assert len(model.calls) == 2


class Shifted(GaussianConsistency):
    """A model that depends on the place in its window, as networks with padding do."""

    def __call__(self, x, t, label=None):
        return super().__call__(x, t) + torch.linspace(-0.1, 0.1, x.shape[-1])


def test_no_seam_is_larger_than_what_lies_inside_a_window():
    model = Shifted(shape=(1, 8, 8))
    fused = Windowed(model, (1, 8, 40))(torch.zeros(1, 1, 8, 40), torch.ones(1))
    inside = 0.2 / 7
    assert fused.diff(dim=-1).abs().max() < 2 * inside


def test_labels_go_with_their_pictures():
    class Labeled(GaussianConsistency):
        def __call__(self, x, t, label=None):
            return torch.ones_like(x) * label.reshape(-1, 1, 1, 1)

    out = Windowed(Labeled(shape=(1, 8, 8)), (1, 12, 20), batch_size=3)(
        torch.zeros(2, 1, 12, 20), torch.ones(2), torch.tensor([4, 7])
    )
    torch.testing.assert_close(out[0], torch.full((1, 12, 20), 4.0))
    torch.testing.assert_close(out[1], torch.full((1, 12, 20), 7.0))


def test_an_edit_through_windows_keeps_what_is_known():
    model = Windowed(GaussianConsistency(shape=(1, 8, 8)), (1, 12, 16))
    y = torch.rand(2, 1, 12, 16) * 2 - 1
    operator = known_patch_means(2)
    out = edit(model, operator, y, streams(2), (5.0, 0.5)).image
    torch.testing.assert_close(operator.project(out), operator.project(y))
