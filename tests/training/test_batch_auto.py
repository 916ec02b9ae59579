"""Batches that do not fit the memory are halved, and nothing but memory changes."""

import json

import pytest
import torch

from cmtool.cli.app import run
from cmtool.cli.options import images_at_once
from cmtool.errors import ConfigError, UsageError
from cmtool.samplers import generate as generating
from cmtool.samplers.generate import generate, out_of_memory
from cmtool.samplers.plan import plan_sampling
from tests.training.tiny import config_of, trainer_of


class SmallMemory:
    """Makes an objective fail for more images than fit, as a device does."""

    def __init__(self, objective, fits: int, error: Exception) -> None:
        self.objective, self.fits, self.error = objective, fits, error
        self.tried: list[int] = []

    def draw(self, *arguments):
        return self.objective.draw(*arguments)

    def loss(self, nets, draw):
        self.tried.append(len(draw.x0))
        loss = self.objective.loss(nets, draw)
        if len(draw.x0) > self.fits:
            raise self.error
        return loss


OOM = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
)


@pytest.mark.parametrize("error", OOM)
def test_micro_batch_auto_halves_until_it_fits_and_trains_the_same(error):
    whole = trainer_of(config_of("ict", steps=3, **{"train.precision": "fp64"}))
    auto = trainer_of(config_of("ict", "train.micro_batch=auto", steps=3, **{"train.precision": "fp64"}))
    auto.objective = SmallMemory(auto.objective, 3, error)
    for _ in range(3):
        whole.step()
        auto.step()
    assert auto.objective.tried == [8, 4, 2, 2, 2, 2] + [2] * 8
    assert auto.remarks == [f"step 0: {n} images at once do not fit memory; {n // 2} now" for n in (8, 4)]
    for a, b in zip(whole.state.parameters(), auto.state.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    one, other = whole.report(), auto.report()
    assert other.loss == pytest.approx(one.loss, rel=1e-12)
    assert other.images_seen == one.images_seen == 24


def test_a_failure_in_the_middle_of_a_step_leaves_nothing_behind():
    """Memory can run out at a later pass: gradients and numbers of the earlier ones must not count twice."""
    whole = trainer_of(config_of("ict", steps=1, **{"train.precision": "fp64"}))
    auto = trainer_of(config_of("ict", "train.micro_batch=auto", steps=1, **{"train.precision": "fp64"}))
    auto.micro = 4
    memory = SmallMemory(auto.objective, 8, OOM[0])

    plain = memory.loss

    def second_fails(*arguments):
        memory.fits = 2 if len(memory.tried) == 1 else 8
        return plain(*arguments)

    memory.loss = second_fails
    auto.objective = memory
    whole.step()
    auto.step()
    assert memory.tried == [4, 4, 2, 2, 2, 2]
    assert auto.report().loss == pytest.approx(whole.report().loss, rel=1e-12)
    for a, b in zip(whole.state.parameters(), auto.state.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_without_auto_or_with_one_image_the_error_is_the_users(monkeypatch):
    plain = trainer_of(config_of("ict", steps=1))
    plain.objective = SmallMemory(plain.objective, 3, OOM[0])
    with pytest.raises(torch.OutOfMemoryError):
        plain.step()
    hopeless = trainer_of(config_of("ict", "train.micro_batch=auto", steps=1))
    hopeless.objective = SmallMemory(hopeless.objective, 0, OOM[0])
    with pytest.raises(torch.OutOfMemoryError):
        hopeless.step()
    assert hopeless.objective.tried == [8, 4, 2, 1]


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    auto = trainer_of(config_of("ict", "train.micro_batch=auto", steps=1))
    auto.objective = SmallMemory(auto.objective, 3, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        auto.step()
    assert not out_of_memory(RuntimeError("shapes differ"))
    assert out_of_memory(MemoryError())


def test_a_coupling_over_the_batch_takes_no_automatic_micro_batch():
    with pytest.raises(ConfigError, match="micro_batch cannot be 'auto'"):
        config_of("ict-ot", "train.micro_batch=auto")


def test_sampling_halves_its_batch_and_makes_the_same_samples(monkeypatch):
    model = trainer_of(config_of("ict")).state.ema
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
    plan, seeds = plan_sampling(model.header), list(range(11))
    whole = torch.cat([batch.x0 for batch in generate(model, plan, seeds, batch_size=11)])
    real, tried = generating.sample_batch, []

    def little_memory(model, plan, seeds, labels=None, *more):
        tried.append(len(seeds))
        if len(seeds) > 3:
            raise OOM[1]
        return real(model, plan, seeds, labels, *more)

    monkeypatch.setattr(generating, "sample_batch", little_memory)
    batches = list(generate(model, plan, seeds, batch_size=64))
    assert tried == [11, 6, 3, 3, 3, 2]
    assert [batch.start for batch in batches] == [0, 3, 6, 9]
    torch.testing.assert_close(torch.cat([batch.x0 for batch in batches]), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "batch", "micro"),
    [
        (("--batch-size", "auto"), 64, "auto"),
        (("--batch-size", "auto", "--micro-batch", "16"), 64, 16),
        (("--batch-size", "32", "--micro-batch", "auto"), 32, "auto"),
        ((), 64, None),
    ],
)
def test_auto_leaves_the_batch_that_trains_and_fits_its_parts(options, batch, micro, capsys):
    assert run(["train-ct", "--preset", "digits", "--recipe", "ict", *options, "--dry-run", "--json"]) == 0
    train = json.loads(capsys.readouterr().out)["config"]["train"]
    assert (train["batch_size"], train["micro_batch"]) == (batch, micro)


def test_a_number_of_images_or_auto():
    assert images_at_once("auto") is None and images_at_once("12") == 12
    for wrong in ("0", "-4", "many", "1.5", ""):
        with pytest.raises(UsageError, match="or auto"):
            images_at_once(wrong)
