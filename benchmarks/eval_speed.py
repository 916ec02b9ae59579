"""How fast are the figures? 50,000 x 2,048 features, beside clean-fid's functions in the same process.

    python benchmarks/eval_speed.py [--count 50000] [--reference 10000] [--dim 2048] [--threads 2] [--json]

Frechet distance from (mu, sigma) and from features, against clean-fid's on the same arrays (where its square root call
still works: scipy 1.18 removed it), and precision + recall of all samples against `--reference` images. Peak memory is
that of this process before clean-fid is called, the two feature arrays included. Processor seconds, over all threads,
stand beside the wall's: on a busy machine they are the ones to read.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cmtool.evaluation.frechet import frechet_distance, frechet_from_features
from cmtool.evaluation.manifold import manifold
from cmtool.evaluation.statistics import statistics


def features(count: int, dim: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """Make non-negative float32 features with a falling spectrum, as pool features of Inception are."""
    random = np.random.default_rng(seed)
    mix = (
        np.random.default_rng(0).standard_normal((dim, dim)).astype(np.float32)
        / np.sqrt(np.arange(1, dim + 1))[:, None]
    )
    out = np.empty((count, dim), np.float32)
    for start in range(0, count, 5000):
        rows = random.standard_normal((min(5000, count - start), dim), dtype=np.float32)
        out[start : start + 5000] = np.abs(rows @ mix * 0.1 * scale + 0.2)
    return out


class Clock:
    """Runs calls one after another; `rows` keeps the seconds of each, on the wall and of all processors."""

    def __init__(self) -> None:
        self.rows: dict[str, float] = {}

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        """Return what `call` returns."""
        start, cpu = time.perf_counter(), time.process_time()
        value = call()
        self.rows[f"{name}, s"] = time.perf_counter() - start
        self.rows[f"{name}, cpu s"] = time.process_time() - cpu
        return value

    def ratio(self, slow: str, fast: str) -> float:
        """Wall seconds of `slow` over those of `fast`."""
        return self.rows[f"{slow}, s"] / self.rows[f"{fast}, s"]


def peak_gigabytes() -> float:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def clean_fid(first: Any, second: Any) -> Callable[[], float] | None:
    """Return clean-fid's distance of two (mu, sigma), None where this scipy has no such call."""
    from cleanfid.fid import frechet_distance as theirs

    try:
        theirs(np.zeros(2), np.eye(2), np.zeros(2), np.eye(2))
    except TypeError:
        return None
    return lambda: float(theirs(first.mean, first.covariance, second.mean, second.covariance))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    real, fake = features(args.count, args.dim, 1), features(args.count, args.dim, 2, 1.05)
    clock = Clock()
    first, second = statistics(real), statistics(fake)
    ours = clock("frechet from mu and sigma", lambda: frechet_distance(first, second))
    clock("frechet from features", lambda: frechet_from_features(real, fake))
    close = clock("precision and recall", lambda: manifold(real[: args.reference], fake))
    rows: dict[str, Any] = {"count": args.count, "dim": args.dim, "threads": args.threads, "frechet": ours}
    rows |= close.figures() | {"peak memory, GB": peak_gigabytes()}
    call = clean_fid(first, second)
    if call is not None:
        from cleanfid.fid import fid_from_feats

        theirs = clock("clean-fid from mu and sigma", call)
        clock("clean-fid from features", lambda: fid_from_feats(real, fake))
        rows["relative difference"] = abs(ours - theirs) / abs(theirs)
        rows["times faster from mu and sigma"] = clock.ratio("clean-fid from mu and sigma", "frechet from mu and sigma")
        rows["times faster from features"] = clock.ratio("clean-fid from features", "frechet from features")
    rows |= clock.rows
    print(json.dumps(rows, indent=2) if args.json else "\n".join(f"{name:36} {rows[name]:.6g}" for name in rows))


if __name__ == "__main__":
    main()
