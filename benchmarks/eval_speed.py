"""The figures of `cmtool eval` from features, against clean-fid's and torch-fidelity's functions in the same process.

Frechet distance from (mu, sigma) and from features, precision and recall (k = 3) of all samples against `--reference`
images; answers must agree before they are timed. scipy 1.18 removed the square root call that clean-fid uses; with a
newer scipy, clean-fid is left out. Peak memory is that of this process before a peer is called, including the two
feature arrays.
"""

from __future__ import annotations

import argparse
import resource
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.pairs import Comparison, Contestant, compare, parser, peers_there, publish
from cmtool.evaluation.frechet import frechet_distance, frechet_from_features
from cmtool.evaluation.manifold import manifold
from cmtool.evaluation.statistics import Statistics, statistics

TOLERANCE = 1e-3
PEERS = ("clean-fid", "torch-fidelity")
Call = Callable[[], Any]


def features(count: int, dim: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """Make non-negative float32 features with a falling spectrum, like Inception's pool features."""
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


def peak_gigabytes() -> float:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def clean_fid(first: Statistics, second: Statistics, real: np.ndarray, fake: np.ndarray) -> dict[str, Call]:
    """Return clean-fid's calls by figure; raises ImportError if they are missing or do not work."""
    from cleanfid.fid import fid_from_feats
    from cleanfid.fid import frechet_distance as theirs

    try:
        theirs(np.zeros(2), np.eye(2), np.zeros(2), np.eye(2))
    except TypeError as error:
        raise ImportError(f"it does not work with this scipy: {error}") from error
    return {
        "from mu and sigma": lambda: float(theirs(first.mean, first.covariance, second.mean, second.covariance)),
        "from features": lambda: float(fid_from_feats(real, fake)),
    }


def torch_fidelity(
    first: Statistics, second: Statistics, real: np.ndarray, fake: np.ndarray, near: int
) -> dict[str, Call]:
    """Return torch-fidelity's calls by figure; raises ImportError if it is missing."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    one, other = torch.from_numpy(real), torch.from_numpy(fake)
    given = [{"mu": s.mean, "sigma": s.covariance} for s in (first, second)]
    options = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "save_cpu_ram": True, "verbose": False}

    def from_features() -> float:
        both = [fid_features_to_statistics(side) for side in (one, other)]
        return float(next(iter(fid_statistics_to_metric(*both, verbose=False).values())))

    def precision_recall() -> tuple[float, float]:
        found = prc_features_to_metric(other, one[:near], **options)
        return float(found["precision"]), float(found["recall"])

    return {
        "from mu and sigma": lambda: float(next(iter(fid_statistics_to_metric(*given, verbose=False).values()))),
        "from features": from_features,
        "precision and recall": precision_recall,
    }


def contests(asked: argparse.Namespace) -> list[Comparison]:
    """Compare each figure with every peer that has it."""
    real, fake = features(asked.count, asked.dim, 1), features(asked.count, asked.dim, 2, 1.05)
    first, second = statistics(real), statistics(fake)

    def precision_recall() -> tuple[float, float]:
        close = manifold(real[: asked.reference], fake)
        return close.precision, close.recall

    own: dict[str, Call] = {
        "from mu and sigma": lambda: frechet_distance(first, second),
        "from features": lambda: frechet_from_features(real, fake),
        "precision and recall": precision_recall,
    }
    answers = {figure: np.asarray(call()) for figure, call in own.items()}
    note = f"peak memory of the process {peak_gigabytes():.1f} GB"
    makers = {
        "clean-fid": lambda: clean_fid(first, second, real, fake),
        "torch-fidelity": lambda: torch_fidelity(first, second, real, fake, asked.reference),
    }
    found, absent = peers_there(asked, makers)
    results = []
    for figure, call in own.items():
        entries = [Contestant("cmtool", True, call, note)]
        for name, calls in found.items():
            if figure in calls:
                off = np.abs(np.asarray(calls[figure]()) - answers[figure]).max()
                assert off < TOLERANCE * max(1.0, float(np.abs(answers[figure]).max())), (name, figure, off)
                entries.append(Contestant(name, False, calls[figure]))
        title = figure if figure.startswith("precision") else f"Frechet distance {figure}"
        title += f": {asked.count:,} x {asked.dim:,}"
        results.append(compare(title, entries, asked.rounds, asked.clock, absent, warm=True))
    return results


def main(arguments: list[str] | None = None) -> None:
    """Measure and publish."""
    made = parser(__doc__)
    made.set_defaults(peers=",".join(PEERS), device="cpu")
    made.add_argument("--count", type=int, default=5_000, help="samples, and images of the Frechet distance")
    made.add_argument("--reference", type=int, default=5_000, help="images of precision and recall")
    made.add_argument("--dim", type=int, default=1024, help="2048 are Inception's, and take several times as long")
    asked = made.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(asked.threads)
    publish("eval", contests(asked), asked)


if __name__ == "__main__":
    main()
