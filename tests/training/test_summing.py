"""Gradients are summed while the backward pass runs: begun early or late, to the same bits (two gloo processes)."""

import json

import pytest
import torch
from torch import nn

from cmtool.training.summing import buckets
from tests.training.sum_worker import CASES, STEPS


@pytest.fixture(scope="module")
def told(two_processes):
    """What both processes found."""
    return [json.loads((two_processes / f"sums-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_early_sums_have_the_bits_of_late_ones_and_the_values_of_one_process(told, case):
    for found in told:
        assert found[case]["same"]
        assert found[case]["apart"] < 1e-7


@pytest.mark.parametrize("case", CASES)
def test_sums_begin_before_the_last_backward_pass_of_a_step_ends(told, case):
    """Those of a pass that is not the last wait, and so do those behind a weight that gets no gradient."""
    passes, sums = {"micro-batches": ("01", 1), "fake network": ("111", 3), "no gradient": ("0", 1)}.get(case, ("1", 1))
    for found in told:
        within, count = [], None
        for event in found[case]["events"]:
            if event == "pass":
                count = 0
            elif event == "end of pass":
                within.append(count)
            elif event == "sum":
                count += 1
        assert "".join(str(int(count > 0)) for count in within) == passes * STEPS
        assert found[case]["buckets"] > 3
        assert found[case]["events"].count("sum") == STEPS * sums * found[case]["buckets"]


def test_buckets_hold_every_weight_once_the_last_first_and_are_not_larger_than_asked():
    layers = [nn.Parameter(torch.zeros(size)) for size in (5, 3, 40, 2, 2)]
    layers.append(nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    found = [[next(i for i, p in enumerate(layers) if p is q) for q in bucket] for bucket in buckets(layers, 32)]
    assert found == [[5], [4, 3], [2], [1, 0]]
    assert buckets([], 32) == []
