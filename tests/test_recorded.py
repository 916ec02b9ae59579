"""Recordings without a GPU: what is done around them, with a graph that runs its work again in place of replaying it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from cmtool.config.load import resolve
from cmtool.data.load import load_dataset
from cmtool.losses.terms import Draw, Slice
from cmtool.machine.recorded import WARM_UP, Recorded, kind_of
from cmtool.training.replay import flattened, replayable
from cmtool.training.setup import prepare


class Graph:
    """Runs the work that was called while it recorded; what that call itself left in gradients is taken back."""

    current: Graph | None = None
    replaying = False
    gradients: tuple[torch.Tensor, ...] = ()

    def __init__(self) -> None:
        self.again = lambda: None

    def replay(self) -> None:
        Graph.replaying = True
        self.again()


class Event:
    """What is timed as it is takes `plain` ms, what is replayed `replayed` ms, known after a call or two."""

    waited = 0
    plain, replayed = 3.0, 1.0

    def __init__(self, enable_timing: bool = False) -> None:
        self.asked, self.replays = 0, False

    def record(self) -> None:
        self.replays = Graph.replaying

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def elapsed_time(self, end: Event) -> float:
        return Event.replayed if end.replays else Event.plain

    def synchronize(self) -> None:
        Event.waited += 1


@pytest.fixture
def cuda(monkeypatch):
    """A device that records; sets what its memory holds."""
    card = SimpleNamespace(used=0)

    @contextlib.contextmanager
    def recording(graph: Graph, pool: object, capture_error_mode: str) -> Iterator[None]:
        kept = [g.clone() for g in Graph.gradients]
        Graph.current = graph
        try:
            yield
        finally:
            Graph.current = None
        for gradient, before in zip(Graph.gradients, kept, strict=True):
            gradient.copy_(before)

    monkeypatch.setattr(Graph, "replaying", False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name, answer in (("get_sync_debug_mode", 0), ("set_sync_debug_mode", None), ("set_stream", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *a, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: card.used)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100))
    return card


def recordable(work):
    """Work whose call under recording fills memory that a replay fills again."""

    def run(*inputs):
        answers = work(*inputs)
        if Graph.current is not None:

            def again() -> None:
                for place, answer in zip(answers, work(*inputs), strict=True):
                    place.copy_(answer)

            Graph.current.again = again
        return answers

    return run


def test_a_recording_is_made_for_each_kind_of_input_and_answers_new_numbers(cuda):
    calls = []
    recorded = Recorded(recordable(lambda x, y: (calls.append(1), (x + (0 if y is None else y),))[1]))
    for value in range(WARM_UP + 3):
        x = torch.full((2,), float(value))
        assert recorded(x, None)[0].tolist() == [value, value]
        assert recorded(x, x)[0].tolist() == [2 * value, 2 * value]
        assert recorded.replays == (value >= WARM_UP)
    assert len(recorded._tapes) == 2
    assert kind_of((x, None)) != kind_of((x.double(), None)) != kind_of((x, x))


def test_answers_belong_to_the_caller(cuda):
    recorded = Recorded(recordable(lambda x: (2 * x,)))
    answers = [recorded(torch.tensor([float(value)]))[0] for value in range(8)]
    assert [float(answer) for answer in answers] == [2.0 * value for value in range(8)]


def test_work_that_cannot_be_recorded_goes_on_as_it_is(cuda):
    def work(x):
        if Graph.current is not None:
            raise RuntimeError("operation not\npermitted when stream is capturing")
        return (x + 1,)

    recorded = Recorded(work)
    assert [float(recorded(torch.zeros(1))[0]) for _ in range(8)] == [1.0] * 8
    assert recorded.reason == "RuntimeError: operation not permitted when stream is capturing"
    assert not recorded.replays


def test_work_that_waits_for_the_gpu_is_not_recorded(cuda):
    calls = []

    def work(x):
        calls.append(1)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return (x + 1,)

    recorded = Recorded(recordable(work))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [float(recorded(torch.zeros(1))[0]) for _ in range(6)] == [1.0] * 6
    assert recorded.reason.startswith("it waits for the GPU (")
    assert (len(calls), recorded.replays) == (6, False)


def test_why_nothing_is_recorded_is_told_once(cuda):
    cuda.used, told = 26, []
    recorded = Recorded(recordable(lambda x: (x,)), tell=told.append)
    for side in (1, 1, 1, 1, 2, 2, 2, 2):
        recorded(torch.zeros(side))
    assert told == ["it takes 26% of the device's memory"]


def test_other_warnings_are_passed_on(cuda, monkeypatch):
    def work(x):
        warnings.warn("mind this", stacklevel=1)
        return (x,)

    def set_mode(mode):
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    recorded = Recorded(recordable(work))
    with pytest.warns(UserWarning, match="mind this") as heard:
        for _ in range(WARM_UP):
            recorded(torch.zeros(1))
    assert len(heard) == WARM_UP


def test_a_recording_that_is_slower_is_dropped(cuda, monkeypatch):
    monkeypatch.setattr(Event, "replayed", 3.5)
    recorded = Recorded(recordable(lambda x: (x + 1,)))
    states = []
    for value in range(WARM_UP + 6):
        assert float(recorded(torch.full((1,), float(value)))[0]) == value + 1
        states.append(recorded.replays)
    assert recorded.reason == "it takes 3.5 ms replayed and 3.0 ms as it is"
    assert states.count(True) >= 2 and not states[-1]


def test_a_recording_that_is_faster_is_kept(cuda):
    recorded = Recorded(recordable(lambda x: (x + 1,)))
    for _ in range(WARM_UP + 6):
        recorded(torch.zeros(1))
    assert (recorded.replays, recorded.reason) == (True, None)


def test_large_work_is_not_recorded(cuda):
    cuda.used = 26
    recorded = Recorded(recordable(lambda x: (x,)))
    for _ in range(WARM_UP + 2):
        recorded(torch.zeros(1))
    assert (recorded.replays, recorded.reason) == (False, "it takes 26% of the device's memory")


def trainer_of(recipe: str, **flags):
    config = resolve("digits", recipe=recipe, sets=("network.channels=8",), flags={"train.threads": 1, **flags}).config
    return prepare(config, load_dataset(config.data), torch.device("cpu"))


def weights(trainer):
    networks = (trainer.state.student.network, trainer.state.ema.network)
    return torch.cat([p.detach().flatten() for network in networks for p in network.parameters()])


def with_replay(trainer):
    """Give a trainer on the CPU what it has on a GPU."""
    before = []

    trainer.batches.settle = lambda: before.append(trainer.state.step)
    trainer.replay = trainer.recorder()
    calls = trainer.replay.calls
    calls._work = recordable(calls._work)
    fix = calls._before

    def prepared():
        fix()
        Graph.gradients = tuple(trainer.replay._gradients.values())

    calls._before = prepared
    return before


@pytest.mark.parametrize("recipe", ["ict", "edm", "ict-gc", "ict-ot", "meanflow", "soflow", "imm"])
@pytest.mark.parametrize("micro", [16, 6])
def test_replayed_steps_are_the_steps(cuda, recipe, micro):
    flags = {"train.batch_size": 16, "train.micro_batch": micro, "train.steps": 40}
    if recipe == "imm":
        flags["recipe.times.group"] = 2
    plain, replayed = trainer_of(recipe, **flags), trainer_of(recipe, **flags)
    paused = with_replay(replayed)
    for _ in range(9):
        plain.step()
        replayed.step()
    assert replayed.replay.calls.replays
    assert replayed.replay.calls.reason is None
    assert len(paused) == (1 if micro == 16 else 2)
    assert float((weights(plain) - weights(replayed)).abs().max()) < 1e-6
    assert abs(plain.report().loss - replayed.report().loss) < 1e-5


def test_a_trainer_remarks_that_its_passes_are_not_recorded(cuda):
    cuda.used = 30
    trainer = trainer_of("ict", **{"train.batch_size": 8, "train.steps": 40})
    with_replay(trainer)
    for _ in range(WARM_UP + 2):
        trainer.step()
    assert trainer.remarks == ["train.cuda_graphs: a pass is not recorded: it takes 30% of the device's memory"]


def test_weights_that_no_pass_reaches_keep_no_gradient(cuda):
    trainer = trainer_of("ict", **{"train.batch_size": 8, "train.steps": 40})
    with_replay(trainer)
    spare = torch.nn.Parameter(torch.ones(3))
    trainer.state.student.network.register_parameter("spare", spare)
    trainer.state.advance_averages = lambda decay: None  # the average has no such weight
    for _ in range(WARM_UP + 2):
        trainer.step()
    assert trainer.replay.calls.replays
    assert spare.grad is None
    assert all(p.grad is not None for p in trainer.state.parameters() if p is not spare)


def test_a_step_far_behind_is_waited_for(cuda):
    trainer = trainer_of("ict", **{"train.batch_size": 8, "train.steps": 40})
    with_replay(trainer)
    Event.waited = 0
    for _ in range(WARM_UP + 1 + 6):
        trainer.step()
    assert Event.waited == 2


@pytest.mark.parametrize(
    ("sets", "device", "expected"),
    [
        ((), "cuda", True),
        ((), "cpu", False),
        (("train.cuda_graphs=false",), "cuda", False),
        (("train.compile=true",), "cuda", False),
        (("train.precision=fp16",), "cuda", False),
        (("network.dropout=0.1",), "cuda", False),
    ],
)
def test_where_passes_are_recorded(sets, device, expected):
    config = resolve("digits", recipe="ict", sets=sets).config
    assert replayable(config, torch.device(device)) is expected
    assert not replayable(config, torch.device(device), processes=2)


def test_a_model_asks_its_recording_while_it_samples_and_its_network_afterwards(monkeypatch):
    model = trainer_of("ict").state.ema
    asked = []

    def recorded(work):
        return lambda *inputs: asked.append(len(inputs)) or work(*inputs)

    x, t = 80 * torch.randn(4, *model.image_shape), torch.full((4,), 80.0)
    plain = model(x, t)
    with model.replaying():
        assert torch.equal(model(x, t), plain)
    assert not asked  # on a CPU there is nothing to record
    monkeypatch.setattr("cmtool.models.Recorded", recorded)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with model.replaying():
        assert torch.equal(model(x, t), plain)
    assert asked == [4]
    assert torch.equal(model(x, t), plain)
    assert len(asked) == 1


def test_a_draw_is_taken_apart_and_put_together_again_whatever_it_carries():
    a, b, c, d, e, told = (torch.full((2,), float(n)) for n in range(6))
    draw = Draw(a, b, (c, d, e), None, 0.5, Slice(1, 2, 3, 4), group=2, share=torch.tensor(0.25), augment=told)
    tensors, put = flattened(draw)
    assert [None if x is None else x.flatten()[0].item() for x in tensors] == [
        0,
        1,
        2,
        3,
        4,
        None,
        0.25,
        None,
        None,
        5,
        None,
    ]
    again = put(tuple(None if x is None else x + 1 for x in tensors))
    assert [time[0].item() for time in again.times] == [3, 4, 5]
    assert (again.x0[0].item(), again.share.item(), again.label, again.made) == (1, 1.25, None, None)
    assert again.augment[0].item() == 6
    assert (again.rows, again.group, again.mix) == (draw.rows, 2, 0.5)
