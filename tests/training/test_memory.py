"""Memory stays where it is: after the first steps and samples, more of them take no more."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MB = 2**20
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux's /proc to see memory")


def resident() -> int:
    """Bytes of this process that lie in memory, without what the allocator holds free for later."""
    import ctypes
    import resource

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def train_for(folder: Path, first: int, last: int) -> int:
    """Growth in bytes of a whole session (reports, checkpoints, grids) from step `first` to `last`."""
    from cmtool.machine.stopping import Stop
    from cmtool.training.run_folder import RunFolder
    from cmtool.training.session import Session
    from tests.training.tiny import Heard, config_of, run, trainer_of

    every = max(first // 2, 1)
    rhythm = [f"train.{name}_every={every}" for name in ("checkpoint", "sample")]
    network = ("network.kind=mlp", "network.num_blocks=1", "network.channels=16")
    config = config_of("ict", *network, *rhythm, steps=last, batch=4)
    folder.mkdir(parents=True)
    session = Session(trainer_of(config), RunFolder(folder), Heard())
    sizes: list[int] = []
    session.chores.append((first, lambda: sizes.append(resident())))
    run(session, Stop())
    return sizes[-1] - sizes[0]


def sample_for(folder: Path, first: int, last: int) -> int:
    """Growth in bytes while samples number `first` to `last` are made and written to an npz.

    The least of the last batches counts each time: what waits for the writer comes and goes.
    """
    from cmtool.data.images import to_uint8
    from cmtool.data.sample_files import NpzSink, in_background
    from cmtool.models import load
    from cmtool.samplers.generate import generate
    from cmtool.samplers.plan import plan_sampling
    from tests.cli.tiny import write_model

    model = load(write_model(folder, channels=1))
    sink = NpzSink(folder / "many.npz", {}, {})
    sizes: dict[int, list[int]] = {first: [], last: []}
    size = min(first // 5, 500)
    with in_background(sink) as writer:
        for batch in generate(model, plan_sampling(model.header), range(last), batch_size=size):
            writer.append(to_uint8(batch.x0).permute(0, 2, 3, 1).numpy(), None)
            done = batch.start + len(batch.x0)
            for mark, seen in sizes.items():
                if mark - first // 2 < done <= mark:
                    seen.append(resident())
    sink.finish()
    return min(sizes[last]) - min(sizes[first])


def test_a_few_hundred_steps_keep_nothing(tmp_path):
    assert train_for(tmp_path / "run", 100, 400) < 8 * MB


def test_a_few_thousand_samples_keep_nothing(tmp_path):
    assert sample_for(tmp_path, 500, 2500) < 8 * MB


@pytest.mark.slow
@pytest.mark.parametrize(("what", "first", "last"), [("train_for", 1000, 5000), ("sample_for", 10_000, 50_000)])
def test_thousands_of_steps_and_samples_keep_nothing(what, first, last, tmp_path):
    """In a process of its own, so that nothing else grows."""
    call = f"print(m.{what}(pathlib.Path(r'{tmp_path}') / 'x', {first}, {last}))"
    code = f"import pathlib, tests.training.test_memory as m; {call}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = int(done.stdout)
    print(f"{what}: {grown / MB:.1f} MB more after {last} than after {first}")
    assert grown < 8 * MB
