"""`cmtool sample` in several processes (torchrun): each makes a share of the seeds, the first puts them together."""

from __future__ import annotations

import glob
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmtool.cli.sample import Job
    from cmtool.data.sample_files import Sink
    from cmtool.machine.world import World


def place_of_share(out: Path, rank: int, size: int) -> Path:
    """Return where process `rank` of `size` keeps its samples until all are there."""
    return out.with_name(f".{out.name}.share-{rank}-of-{size}")


def share_of(job: Job, first: int, count: int, place: Path) -> Job:
    """Return the job of the samples `first` .. `first + count` alone."""
    labels = None if job.labels is None else job.labels[first : first + count]
    return replace(job, seeds=job.seeds[first : first + count], labels=labels, out=place)


def device_here(name: str, local_rank: int) -> str:
    """The GPU of this process; anything else is the same for all."""
    import torch

    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{local_rank % torch.cuda.device_count()}"
    return name


def make_together(job: Job, batch_size: int | None, device: str) -> Path | None:
    """Make this process's share and, in process 0, the whole; sample i is the one that a single process makes.

    A share survives a kill, also while shares are put together: the same command in as many processes goes on with it.

    Returns:
        Where the samples are, in process 0; None in the others.
    """
    from cmtool.machine.world import join_world

    # Nothing but flags travels between these processes: no GPU is needed for it.
    with join_world("cpu") as world:
        return make_in(world, job, batch_size, device)


def make_in(world: World, job: Job, batch_size: int | None, device: str) -> Path | None:
    """Do what `make_together` does among processes that have met already."""
    import torch

    from cmtool.api.find import load_model
    from cmtool.cli.output import Output
    from cmtool.cli.sample import open_sink, write_samples
    from cmtool.data.sample_files import ShareSink

    sink = open_sink(job) if world.main else None
    done = world.any(sink is not None and sink.start == len(job.seeds), torch.device("cpu"))
    first, count = world.rows(len(job.seeds))
    place = place_of_share(job.out, world.rank, world.size)
    if count and not done:
        share = share_of(job, first, count, place)
        kept = ShareSink(place, share.request())
        if kept.start < count:
            model = load_model(job.found, device_here(device, world.local_rank), job.precision)
            write_samples(share, model, batch_size, Output.of_rank(quiet=True), kept)
    world.wait()
    return None if sink is None else _assemble(job, sink, world.size)


def _assemble(job: Job, sink: Sink, size: int) -> Path:
    """Hand the shares to the sink shard by shard, after what it has already, and remove all that there are."""
    from cmtool.data.shards import ShardStore

    first, skip = 0, sink.start
    for rank in range(size):
        count = len(job.seeds) * (rank + 1) // size - first
        place = place_of_share(job.out, rank, size)
        request = share_of(job, first, count, place).request()
        first += count
        for samples, labels in ShardStore(place, request).blocks() if count else ():
            late = min(skip, len(samples))
            skip -= late
            if late < len(samples):
                sink.append(samples[late:], None if labels is None else labels[late:])
    path = sink.finish()
    # Those of another number of processes too, which nobody will go on with.
    for folder in job.out.parent.glob(f".{glob.escape(job.out.name)}.share-*-of-*.partial"):
        shutil.rmtree(folder, ignore_errors=True)
    return path
