"""Windows: they cover, they agree with the model itself, and they leave no seam."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmtool.editing.loop import edit, known_patch_means
from cmtool.editing.windows import Windowed, positions, taper
from tests.samplers.oracle import GaussianConsistency, streams


@given(st.integers(8, 200), st.integers(2, 32), st.floats(0.0, 0.8), st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_windows_cover_and_overlap_as_asked(length, window, overlap, offset):
    if window > length:
        return
    starts = positions(length, window, overlap, offset)
    assert starts[0] == 0
    assert starts[-1] == length - window
    strides = [b - a for a, b in itertools.pairwise(starts)]
    assert all(1 <= stride <= max(1, math.floor(window * (1 - overlap))) for stride in strides)


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
    view, inside = Windowed(model, (1, 8, 40)), 0.2 / 7
    for t in torch.linspace(0.1, 20, 30):
        fused = view(torch.zeros(1, 1, 8, 40), t[None])
        assert fused.diff(dim=-1).abs().max() < 2 * inside


def test_the_windows_of_a_level_are_always_the_same_and_those_of_levels_differ():
    view = Windowed(Shifted(shape=(1, 8, 8)), (1, 24, 40))
    assert view.corners(0.7) == view.corners(0.7)
    assert len({tuple(view.corners(t)) for t in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)}) > 3


def test_a_subject_that_is_always_in_the_middle_does_not_become_a_lattice():
    class Centered(GaussianConsistency):
        def __call__(self, x, t, label=None):
            out = torch.zeros_like(x)
            out[..., 3:5, 3:5] = 1.0
            return out

    view = Windowed(Centered(shape=(1, 8, 8)), (1, 40, 40))
    answers = torch.stack([view(torch.zeros(1, 1, 40, 40), torch.tensor([t])) for t in torch.linspace(0.1, 5, 20)])
    inner = answers[..., 8:32, 8:32]
    assert inner.mean(0).std() < 0.4 * inner[0].std()


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


def test_no_more_windows_than_a_batch_are_held_and_their_number_changes_nothing():
    sizes = []

    class Counting(Shifted):
        def __call__(self, x, t, label=None):
            sizes.append(len(x))
            return super().__call__(x, t)

    x = torch.randn(3, 1, 20, 28, generator=torch.Generator().manual_seed(0))
    t = torch.full((3,), 1.0)
    small = Windowed(Counting(shape=(1, 8, 8)), (1, 20, 28), batch_size=5)(x, t)
    assert max(sizes) == 5
    torch.testing.assert_close(small, Windowed(Shifted(shape=(1, 8, 8)), (1, 20, 28), batch_size=1000)(x, t))
