"""Algorithm 1 against the exact consistency function of Gaussian data."""

import pytest
import torch

from cmtool.samplers.times import times_from_indices
from tests.samplers.oracle import GaussianConsistency, sample_multistep, streams


@pytest.mark.parametrize("times", [(80.0,), (80.0, 0.8), (80.0, 5.0, 0.8, 0.1)])
def test_any_times_keep_the_variance_of_the_data(times):
    model = GaussianConsistency(s=0.5, shape=(1, 40, 50))
    x = sample_multistep(model, streams(40, dtype=torch.float64), times)
    # From 80 the exact map gives s^2 + eps^2 up to (80^2 / (80^2 + s^2)); the error of a sample variance is sqrt(2 / n).
    expected = (0.5**2 + 0.002**2) * (1 if len(times) > 1 else 80**2 / (80**2 + 0.5**2))
    assert x.var().item() == pytest.approx(expected, rel=4 * (2 / x.numel()) ** 0.5)
    assert model.calls == list(times)


def test_index_lists_end_in_no_evaluation():
    model = GaussianConsistency()
    sample_multistep(model, streams(2), times_from_indices((0, 22, 39), 40))
    assert len(model.calls) == 2
    assert model.calls[1] == pytest.approx(1.382368, rel=1e-5)


def test_renoising_adds_the_time_less_sigma_min_in_squares():
    class Zero(GaussianConsistency):
        def __call__(self, x, t, label=None):
            self.seen = x
            return torch.zeros_like(x)

    model = Zero(shape=(1, 100, 100), sigma_min=0.6)
    sample_multistep(model, streams(4), (80.0, 1.0))
    assert model.seen.std().item() == pytest.approx(0.8, rel=0.02)


def test_the_step_at_sigma_min_adds_no_noise_and_no_nan():
    model = GaussianConsistency()
    for dtype, atol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        one = sample_multistep(model, streams(3, dtype=dtype), (80.0,))
        two = sample_multistep(model, streams(3, dtype=dtype), (80.0, 0.002))
        torch.testing.assert_close(one, two, rtol=0, atol=atol)


def test_clamp_is_applied_between_the_steps_and_can_be_off():
    model = GaussianConsistency(s=5.0)
    clamped = sample_multistep(model, streams(50), (80.0, 0.01), clamp=True)
    free = sample_multistep(model, streams(50), (80.0, 0.01))
    assert clamped.abs().max() <= 1
    assert free.abs().max() > 5


def test_one_batch_of_eight_is_three_and_five():
    model = GaussianConsistency()
    whole = sample_multistep(model, streams(8), (80.0, 0.8), clamp=True)
    parts = [
        sample_multistep(model, streams(3), (80.0, 0.8), clamp=True),
        sample_multistep(model, streams(5, first=3), (80.0, 0.8), clamp=True),
    ]
    assert torch.equal(whole, torch.cat(parts))
