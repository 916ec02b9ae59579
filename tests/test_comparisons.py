"""What the comparisons of recipes in benchmarks/ are judged by: distances of points, verdicts, tables, names."""

import sys
from pathlib import Path

import pytest
import torch

from cmtool.data.shapes import SHAPES
from cmtool.data.toy import HELD_OUT, toy2d_points

FOLDER = str(Path(__file__).parent.parent / "benchmarks")


@pytest.fixture
def scripts(monkeypatch):
    """The scripts import each other by name, as they do when one is run."""
    monkeypatch.syspath_prepend(FOLDER)
    import ablations
    import recipe_shootout
    import trial

    yield ablations, recipe_shootout, trial
    for name in ("ablations", "recipe_shootout", "trial", "digits_quality"):
        sys.modules.pop(name, None)


def test_points_that_are_all_moved_are_as_far_off_as_they_were_moved(scripts):
    real = torch.from_numpy(toy2d_points("gaussians8", HELD_OUT, 500)[0]).reshape(500, 2, 1, 1)
    score = scripts[2].score_points
    assert score(real) == {"distance": pytest.approx(0, abs=1e-6), "precision": 1.0, "recall": 1.0}
    moved = real + torch.tensor([0.03, 0.04]).reshape(1, 2, 1, 1)
    assert score(moved)["distance"] == pytest.approx(50, abs=0.1)
    other = score(torch.from_numpy(toy2d_points("gaussians8", 0, 500)[0]).reshape(500, 2, 1, 1))
    assert 30 < other["distance"] < 150  # two draws of one law
    assert score(5 * real)["precision"] == 0.0


def test_a_finding_needs_zero_outside_the_interval_of_differences_by_seed(scripts):
    verdict = scripts[2].verdict
    # Spread over seeds that both share does not count; t is 4.303 at three seeds and 12.706 at two.
    assert verdict([1.0, 20.0, 3.0], [10.0, 31.0, 13.0]) == "holds: difference +10.0 ± 2.5"
    assert verdict([10.0, 31.0, 13.0], [1.0, 20.0, 3.0]) == "does not hold: difference -10.0 ± 2.5"
    assert verdict([1.0, 20.0], [10.0, 31.0]) == "is open: difference +10.0 ± 12.7"
    assert "one seed" in verdict([1.0], [2.0])


def test_the_table_orders_recipes_and_keeps_contests_apart(scripts, tmp_path):
    _, shootout, trial = scripts
    contest = shootout.Contest("digits", 5e5, ("network.channels=16",), tmp_path)
    at = {"precision": 0.5, "recall": 0.25}
    rows = [
        {
            **contest.marks,
            "recipe": name,
            "seed": seed,
            "steps": 7,
            "nfe1": {"distance": d, **at},
            "nfe2": {"distance": 1.0, **at},
        }
        for name, seed, d in (("ict", 0, 9.0), ("ict", 1, 11.0), ("cd", 0, 4.0))
    ]
    lines = shootout.table(rows, contest).splitlines()
    assert lines[0].startswith("digits network.channels=16; budget 500 thousand")
    assert lines[2].startswith("| recipe | seeds | steps | FD, 1 step")
    assert lines[4] == "| cd | 1 | 7 | 4.0 | 0.50 | 0.25 | 1.0 | 0.50 | 0.25 |"
    assert lines[5] == "| ict | 2 | 7 | 10.0 ± 1.4 | 0.50 | 0.25 | 1.0 ± 0.0 | 0.50 | 0.25 |"
    found = shootout.findings([{**row, "recipe": {"ict": "cd", "cd": "ct"}[row["recipe"]]} for row in rows], "FD")
    assert found.splitlines()[2] == "| cd | ct | 1 | difference -5.0 (one seed: nothing can be said) | " + (
        "Song et al. 2023: distillation above training |"
    )
    assert trial.file_name("digits", "0.5k", 'recipe.gap={q="4"}') == "digits-0.5k-recipe.gap--q--4--"


def test_stored_pairs_are_paid_for(scripts, tmp_path, monkeypatch):
    """Half of what a recipe with stored pairs has left goes into them, at 35 teacher calls a pair of 18 Heun steps."""
    _, shootout, trial = scripts
    seen = {}
    monkeypatch.setattr(shootout, "source_for", lambda contest, recipe, seed: None)
    monkeypatch.setattr(trial, "train", lambda entry, steps, out: seen.update(sets=entry.sets, steps=steps))
    monkeypatch.setattr(trial, "quality", lambda *given: {})
    contest = shootout.Contest("digits", 70_000, (), tmp_path, {"kd": 100.0})
    shootout.run(contest, "kd", 0)
    assert seen == {"sets": ("recipe.coupling.pairs=1000",), "steps": 350}


def test_one_run_under_two_names_is_trained_once(scripts):
    """An arm that writes a default out is the run without it; anything else is another run."""
    ablations, _, trial = scripts

    def digest(*sets, recipe="cd"):
        return ablations.digest(trial.Trial("digits", recipe, 0, sets), 50)

    assert digest() == digest("recipe.curriculum.s1=18") == digest('recipe.distance.kind="l2"')
    assert len({digest(), digest("recipe.curriculum.s1=36"), digest(recipe="cd-euler")}) == 3
    for key, ablation in ablations.ABLATIONS.items():
        names = [arm.name for arm in ablation.arms]
        assert len(names) == len(set(names)), key
        assert all(name.partition("@")[0] in names for pair in ablation.findings for name in pair)


def test_shares_are_those_of_thinned_data_that_the_network_is_not_told_of(monkeypatch):
    """A network that knows classes is asked for each alike: its shares would be the sampler's, not its own."""
    monkeypatch.syspath_prepend(FOLDER)
    import class_shares

    data = class_shares.thinned("toy2d")
    assert data.labels is None
    images = data.batch(torch.arange(len(data)))[0]
    found = class_shares.shares(images, "toy2d")
    assert found.tolist() == pytest.approx([2.0**-k / (2 - 2**-7) for k in range(8)], abs=0.02)
    assert class_shares.rare(found) == pytest.approx(float(found[4:].sum()))
    assert class_shares.apart(found, found[::-1]) == pytest.approx(float(abs(found - found[::-1]).sum() / 2))
    points, labels = toy2d_points("gaussians8", HELD_OUT, 200)
    assert class_shares.classes_of(torch.from_numpy(points), "toy2d").tolist() == labels.tolist()
    shapes = class_shares.thinned("shapes")
    assert shapes.labels is None
    assert len(shapes) == pytest.approx(sum(5000 / len(SHAPES) / 2**k for k in range(len(SHAPES))), rel=0.05)
    for name in ("class_shares", "trial", "digits_quality"):
        sys.modules.pop(name, None)
