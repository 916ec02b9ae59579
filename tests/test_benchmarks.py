"""The arithmetic of the benchmarks, `cmtool bench`, and the share of a step that is no network."""

import argparse
import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import averages, overhead
from benchmarks.matched import Peer, disagreement, enliven, matched_config, peers_of, pictures
from benchmarks.pairs import Comparison, Contestant, compare, parser, quartiles
from cmtool.cli.app import run
from cmtool.config.load import resolve
from cmtool.training import bench
from cmtool.training.bench import Stopwatch, Trial, stand_in_data
from cmtool.training.setup import fresh_student

SMALL = ["--threads", "1", "--clock", "cpu", "--rounds", "1", "--batch", "2", "--channels", "32", "--side", "8"]
SMALL += ["--blocks", "1", "--peers", "none"]


def asked(**changes):
    return argparse.Namespace(**{**vars(parser("x").parse_args(SMALL)), **changes})


def small_model():
    model = fresh_student(matched_config(asked(), "ct"), pictures(asked(), 4)).requires_grad_(False).eval()
    enliven(model.network)
    return model


def test_ratios_are_taken_round_by_round():
    """A machine that slows both down in one round must not move the ratio."""
    contestants = [Contestant("ours", True, print), Contestant("theirs", False, print)]
    found = Comparison("x", contestants, {"ours": [1.0, 5.0, 2.0], "theirs": [2.0, 10.0, 4.0]}, {"gone": "not here"})
    [ratio] = found.ratios()
    assert (ratio["ratio"], ratio["low"], ratio["high"]) == (2.0, 2.0, 2.0)
    assert found.row("ours")["median_ms"] == 2000
    assert "**2.00**" in found.markdown()
    assert "skipped: gone (not here)" in found.markdown()
    assert json.loads(json.dumps(found.document()))["rounds"] == 3


def test_quartiles_of_known_numbers():
    assert quartiles([1, 2, 3, 4, 5]) == (2, 3, 4)
    assert quartiles([7]) == (7, 7, 7)


def test_everyone_runs_in_every_round_and_not_always_in_one_order():
    order = []
    contestants = [Contestant(name, name == "a", lambda name=name: order.append(name)) for name in "abc"]
    found = compare("x", contestants, 3, "cpu")
    assert order == list("abc" + "abc" + "bca" + "cab")
    assert all(len(seconds) == 3 for seconds in found.seconds.values())


def test_the_check_of_ect_peers_sees_every_layer():
    """DDPM++ starts its last layers near zero: without new weights the answer is the input whatever the rest does."""
    from benchmarks import ect_step

    model = fresh_student(ect_step.config_of(asked(), "edm"), pictures(asked(), 4)).requires_grad_(False).eval()
    ect_step.redraw(model.network)
    other = copy.deepcopy(model)

    class Twin:
        name = "twin"

        def answer(self, x, t):
            return other(x, t)

    assert ect_step.disagreement(model, Twin()) == 0
    names = [name for name, p in model.network.named_parameters() if p.dim() > 1]
    for name in (names[0], names[len(names) // 2], names[-1]):
        kept = other.network.get_parameter(name).clone()
        other.network.get_parameter(name).mul_(1.01)
        assert ect_step.disagreement(model, Twin()) > 1e-4, name
        other.network.get_parameter(name).copy_(kept)


def test_the_ect_step_runs_and_names_absent_checkouts(capsys, monkeypatch):
    from benchmarks import ect_step

    for name in ("ECT_PATH", "FASTGEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    ect_step.main([*SMALL[:-1], "ect,fastgen", "--json"])
    [found] = json.loads(capsys.readouterr().out)["comparisons"]
    assert len(found["contestants"]) == 4
    assert found["absent"]["ect"] == "no checkout: --ect-path DIR or $ECT_PATH"


def test_a_peer_that_answers_otherwise_is_refused(monkeypatch):
    model = small_model()
    same = Peer("same", model.network, lambda x, c: model.network(x, c))
    other = Peer("other", model.network, lambda x, c: model.network(x, c) * 1.001)
    assert disagreement(model, same) == 0
    assert disagreement(model, other) == pytest.approx(1e-3, rel=1e-2)
    monkeypatch.setattr("benchmarks.matched.diffusers_peer", lambda model: other)
    with pytest.raises(AssertionError, match="the same weights differs by"):
        peers_of(model, asked(peers="diffusers"))


def test_absent_peers_are_named(monkeypatch):
    def gone(model):
        raise ImportError("No module named 'diffusers'")

    monkeypatch.setattr("benchmarks.matched.diffusers_peer", gone)
    found, absent = peers_of(small_model(), asked(peers="diffusers,openai", openai_path=None))
    assert found == []
    assert set(absent) == {"diffusers", "openai"}
    assert "OPENAI_CM_PATH" in absent["openai"]


def test_diffusers_with_our_weights_answers_the_same():
    pytest.importorskip("diffusers")
    [peer], _ = peers_of(small_model(), asked(peers="diffusers"))
    assert disagreement(small_model(), peer) < 1e-5


def test_comparisons_run_alone_and_write_both_forms(tmp_path, capsys):
    averages.main([*SMALL, "--peers", "none", "--out", str(tmp_path), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["comparisons"][0]["contestants"]["cmtool"]["ours"] is True
    assert (tmp_path / "averages.md").read_text().startswith("### 10 updates")
    assert json.loads((tmp_path / "averages.json").read_text())["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["train-step", "sample", "teacher"])
def test_step_and_sampling_run_without_peers(name, monkeypatch, capsys):
    from benchmarks import sampling, teacher_sampling, train_step

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    extra = {"train-step": ["--recipes", "ict,cd"], "sample": ["--count", "2", "--steps", "2", "--forms", "png"]}
    extra["teacher"] = ["--steps", "2"]
    modules = {"train-step": train_step, "sample": sampling, "teacher": teacher_sampling}
    modules[name].main([*SMALL, *extra[name]])
    assert "| cmtool fp32 |" in capsys.readouterr().out


def test_figures_are_timed_where_peers_agree(monkeypatch, capsys):
    """Tiny features: answers of the peers that are there are held to ours before anybody is timed."""
    from benchmarks import eval_speed

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    small = ["--count", "300", "--reference", "200", "--dim", "16", "--rounds", "2", "--json"]
    eval_speed.main(small)
    document = json.loads(capsys.readouterr().out)
    titles = [comparison["title"] for comparison in document["comparisons"]]
    assert titles == [
        "Frechet distance from mu and sigma: 300 x 16", "Frechet distance from features: 300 x 16",
        "precision and recall: 300 x 16",
    ]  # fmt: skip
    peers = {*document["comparisons"][2]["contestants"], *document["comparisons"][2]["absent"]}
    assert {"cmtool", "torch-fidelity"} <= peers
    eval_speed.main([*small, "--peers", "none"])
    assert list(json.loads(capsys.readouterr().out)["comparisons"][0]["contestants"]) == ["cmtool"]


def test_an_unknown_peer_is_answered_with_the_names():
    with pytest.raises(SystemExit, match="unknown peer 'foo'; choose from diffusers, openai, openai-own, none"):
        peers_of(small_model(), asked(peers="foo"))


def test_an_unknown_benchmark_is_answered_with_the_names():
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-m", "benchmarks", "speed"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 2
    assert (
        "train-step|ect-step|sample|teacher|equal-time|eval|averages|overhead|scale|card|pair-cost|card-day|side-by-side"
        in done.stderr
    )


def test_a_stopwatch_counts_inner_parts_once():
    now = [0.0]

    def work(seconds):
        now[0] += seconds

    watch = Stopwatch(lambda: now[0])
    inner = watch.timed("inner", lambda: work(2.0))

    def outer():
        work(1.0)
        inner()
        work(0.5)
        inner()

    watch.timed("outer", outer)()
    assert watch.seconds == {"outer": 1.5, "inner": 4.0}


def test_parts_of_a_step_add_up_and_the_network_is_most_of_it():
    parts = dict.fromkeys(bench.PARTS, 0.0) | {"forward": 6.0, "backward": 3.0, "optimizer": 0.5, "rest": 0.5}
    assert bench.overhead(parts) == pytest.approx(0.1)


def test_a_step_of_several_passes_moves_its_weights_once():
    """Overhead falls with the passes of a step, and the run's length is that of its own steps."""
    parts = dict.fromkeys(bench.PARTS, 0.0) | {"forward": 6.0, "backward": 3.0, "optimizer": 0.5, "rest": 0.5}
    whole = bench.whole_step(parts, 4)
    assert (whole["forward"], whole["backward"], whole["optimizer"], whole["rest"]) == (24.0, 12.0, 0.5, 0.5)
    assert bench.overhead(whole) == pytest.approx(1 / 37)


def test_the_search_doubles_the_batch_until_time_memory_or_the_batch_ends(monkeypatch):
    config = resolve("digits", recipe="ict", flags={"train.precision": "fp32"}).config
    tried = []

    def fake(config, data, device, precision, batch):
        tried.append(batch)
        if batch > limit:
            raise torch.OutOfMemoryError("out of memory")
        return Trial(precision, batch, 1e-3 * batch, 0)

    monkeypatch.setattr(bench, "trial", fake)
    for limit, seconds, wanted in ((10**6, 60.0, [8, 16, 32, 64]), (20, 60.0, [8, 16, 32]), (10**6, 0.01, [8])):
        tried.clear()
        found = list(bench.search(config, None, torch.device("cpu"), seconds))
        assert tried == wanted
        assert [t.batch for t in found] == [b for b in wanted if b <= limit]
        assert found[0].images_per_s == pytest.approx(1000)


@pytest.mark.parametrize(
    ("half", "in_turns", "best", "asked"),
    [
        (900, 1.2, "bf16", 1),
        (900, 1.05, "fp32", 1),
        (1100, 1.05, "fp32", 1),
        (1500, 0.9, "bf16", 0),
        (600, 2.0, "fp32", 0),
    ],
)
def test_a_half_is_the_best_precision_if_it_gains_in_turns_too(half, in_turns, best, asked):
    turns = []
    trials = [Trial("fp32", 8, 8 / 500, 0), Trial("fp32", 16, 16 / 1000, 0), Trial("bf16", 16, 16 / half, 0)]
    found = bench.best_of(trials, lambda one, other: turns.append((one, other)) or in_turns)
    assert (found.precision, turns) == (best, [(trials[1], trials[2])] * asked)


def test_precisions_are_compared_at_one_batch():
    """The fastest of each, at two batches, would answer another question."""
    trials = [Trial("fp32", 32, 32 / 550, 0), Trial("fp32", 64, 64 / 530, 0), Trial("bf16", 64, 64 / 560, 0)]
    assert bench.best_of(trials, lambda one, other: 1.0) is trials[1]
    trials = [Trial("fp32", 16, 16 / 500, 0), Trial("bf16", 16, 16 / 400, 0), Trial("bf16", 32, 32 / 520, 0)]
    assert bench.best_of(trials, lambda one, other: 1.2 if (one, other) == (trials[0], trials[2]) else 0) is trials[2]


def test_trials_of_one_precision_are_not_taken_in_turns():
    trials = [Trial("bf16", 8, 8 / 500, 0), Trial("bf16", 16, 16 / 400, 0)]
    assert bench.best_of(trials, None) is trials[0]


def test_steps_in_turns_tell_how_many_times_faster_one_is(monkeypatch):
    """Against a clock whose machine slows down: pairs do not see it. Seconds an image count, not a step."""
    pace = itertools.count(1)

    def cost(config, data, device, precision, batch):
        return 1.0 if precision == "fp32" else 4.0

    monkeypatch.setattr(bench, "_warm", cost)
    monkeypatch.setattr(bench, "_step", lambda cost: cost * (1 + 0.001 * next(pace)))
    monkeypatch.setattr(bench, "SPAN", 0.01)
    one, other = Trial("fp32", 8, 0.01, 0), Trial("bf16", 64, 0.06, 0)
    assert bench.in_turns(None, None, torch.device("cpu"), one, other) == pytest.approx(2.0, rel=2e-3)
    slow = Trial("bf16", 64, 0.08, 0)
    assert bench.in_turns(None, None, torch.device("cpu"), one, slow) == pytest.approx(1.0), "its trials are enough"


def test_two_that_do_not_fit_the_memory_at_once_are_compared_by_their_trials(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(bench, "_warm", full)
    one, other = Trial("fp32", 8, 1.0, 0), Trial("bf16", 8, 0.5, 0)
    assert bench.in_turns(None, None, torch.device("cpu"), one, other) == 2.0


def test_data_of_a_published_preset_is_replaced_by_bytes_of_its_shape():
    data = stand_in_data(resolve("imagenet64").config, 6)
    assert tuple(data.images.shape) == (6, 3, 64, 64)
    assert data.num_classes == 1000
    assert stand_in_data(resolve("cifar10").config, 2).labels is None
    latents = stand_in_data(resolve("imagenet256").config, 2)
    assert latents.batch(torch.arange(2))[0].shape == (2, 4, 32, 32) and latents.latent["pixels"] == [3, 256, 256]


@pytest.mark.parametrize("recipe", ["ict", "cd", "tcm"])
def test_bench_measures_any_recipe(recipe, capsys):
    small = ["network.channels=8", "network.head_channels=8", "data.size=64", "train.batch_size=8"]
    sets = [part for setting in small for part in ("--set", setting)]
    arguments = ["bench", "--preset", "digits", "--recipe", recipe, *sets, "--seconds", "0.1", "--price", "3"]
    assert run([*arguments, "--device", "cpu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["best"]["images_per_s"] > 0
    assert document["parts_ms"]["backward"] > 0
    assert (document["parts_ms"]["teacher"] > 0) == (recipe == "cd")
    assert document["estimate"]["seconds"] == pytest.approx(
        document["estimate"]["steps"] * sum(document["parts_ms"].values()) / 1e3
    )
    assert document["estimate"]["cost"] == pytest.approx(3 * document["estimate"]["seconds"] / 3600)


def test_bench_measures_a_preset_of_latents(capsys):
    small = ["network.width=16", "network.depth=1", "network.heads=2", "network.patch=8", "train.batch_size=8"]
    sets = [part for setting in small for part in ("--set", setting)]
    words = ["bench", "--preset", "imagenet256", *sets, "--seconds", "0.1", "--precision", "fp32", "--device", "cpu"]
    assert run([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["best"]["images_per_s"] > 0 and document["images"] == "random latents"


@pytest.mark.slow
def test_what_is_no_network_takes_under_a_tenth_of_a_step():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shares = [overhead.measure("digits", recipe, 20)["overhead"] for recipe in ("ict-pm", "edm")]
    finally:
        torch.set_num_threads(threads)
    assert max(shares) < 0.10, shares


def test_profiling_times_every_part(monkeypatch):
    found = overhead.measure("toy2d", "ict", 2)
    assert all(found[part] >= 0 for part in bench.PARTS)
    assert found["backward"] > 0


def test_the_convolutions_of_a_pair_are_counted_and_timed(tmp_path, capsys):
    """Every convolution of the network once; operations as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import pair_cost

    small = ["--preset", "digits", "--set", "network.channels=8", "--batch", "2", "--rounds", "1", "--device", "cpu"]
    pair_cost.main([*small, "--out", str(tmp_path / "cost.json")])
    found = json.loads((tmp_path / "cost.json").read_text())
    assert f"| all | | {sum(row['layers'] for row in found['rows'])} |" in capsys.readouterr().out
    for row in found["rows"]:
        assert min(row["ms"].values()) > 0 and list(row["ms"]) == list(pair_cost.PARTS)
        kind = (tuple(row["input"]), tuple(row["weights"]), pair_cost.Geometry(*row["geometry"]))
        work = pair_cost.works(kind, 2, torch.device("cpu"))["W x"]
        with FlopCounterMode(display=False) as counted:
            work()
        assert counted.get_total_flops() == row["flops"]


def test_equal_time_judges_images_at_the_size_of_the_pictures(monkeypatch, tmp_path):
    """A plan may train at a smaller size; the others are given the pictures' own."""
    from benchmarks import equal_time

    held = tmp_path / "held.npz"
    np.savez(held, arr_0=np.zeros((4, 16, 16, 1), np.uint8))
    seen = []

    def told(*words):
        seen.append((np.load(words[1])["arr_0"], words[3]))
        return json.dumps({"results": [{"metrics": {"fid": 1.0}}]})

    monkeypatch.setattr(equal_time, "cmtool", told)
    found = equal_time.judged(lambda x, t: x * 0 - 1, (1, 8, 8), argparse.Namespace(num=3), held, tmp_path)
    assert found == {"1": {"fid": 1.0}, "2": {"fid": 1.0}}
    assert [(images.shape, int(images.max()), at) for images, at in seen] == 2 * [((3, 16, 16, 1), 0, held)]
