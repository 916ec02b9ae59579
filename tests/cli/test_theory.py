"""`cmtool theory` as a user types it: one table, files, JSON, and one sentence for every mistake."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest

from cmtool.theory import report, study
from cmtool.theory.checks import near
from cmtool.theory.study import power_law

SMALL = {
    "scaling": ["--d", "1,2", "--T", "16,32", "--data", "gauss:0;1"],
    "classes": ["--size", "1,3", "--T", "10"],
    "schedules": ["--T", "40", "--s", "0.5,1"],
    "typical": ["--T", "20", "--count", "20", "--c3", "0.5"],
    "edm": ["--N", "5,9", "--data", "gmm:.5,.5;-.5,.5;.3"],
    "gap": ["--N", "10", "--huber", "0.3"],
    "chain": ["--T", "10", "--count", "40", "--walks", "5"],
}


@pytest.mark.parametrize("name", SMALL)
def test_a_study_prints_a_table_and_writes_its_files(cmtool, workdir, name):
    typed = cmtool("theory", name, *SMALL[name], "--out", "made")
    assert typed.code == 0, typed.err
    document = json.loads((workdir / "made" / f"{name}.json").read_text())
    assert document["tables"][0]["columns"][0] in typed.out and document["findings"]
    with (workdir / "made" / f"{name}.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == document["tables"][0]["columns"] and len(rows) == 1 + len(document["tables"][0]["rows"])
    assert (workdir / "made" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"<svg" in (workdir / "made" / f"{name}.svg").read_bytes()[:1000]
    assert not [path for path in (workdir / "made").iterdir() if path.suffix not in (".csv", ".json", ".png", ".svg")]


def test_json_is_one_document_with_the_exponents(cmtool):
    typed = cmtool("theory", "scaling", *SMALL["scaling"], "--T", "16,32,64,128", "--json")
    document = json.loads(typed.out)
    in_d = next(fit for fit in document["fits"] if fit["name"].startswith("W2 in d"))
    assert in_d["exponent"] == pytest.approx(0.5) and in_d["theorem"] == 2.5
    assert any(path.endswith("scaling.png") for path in document["files"])
    assert typed.err == ""


def test_exponents_stand_beside_the_theorem(cmtool):
    typed = cmtool("theory", "scaling", "--T", "16,32,64", "--d", "1,4")
    assert re.search(r"law\s+measured\s+std. error\s+theorem", typed.out)
    assert "C1" in typed.err and "no distance here is estimated from samples" in typed.err


def test_a_covariance_gives_bounds(cmtool, workdir):
    np.savetxt(workdir / "cov.csv", [[1.0, 0.2], [0.2, 0.5]], delimiter=",")
    document = json.loads(cmtool("theory", "scaling", "--cov", "cov.csv", "--T", "16,32", "--json").out)
    rows = document["tables"][0]["rows"]
    assert [row[0] for row in rows] == [2, 2] and all(row[2] < row[3] <= row[2] * 1.26 for row in rows)


def test_finite_samples_and_scaled_weights(cmtool):
    typed = cmtool("theory", "scaling", "--T", "16", "--d", "1", "--n", "100", "--json")
    table = json.loads(typed.out)["tables"][-1]
    assert table["rows"][0][2] == pytest.approx(table["rows"][0][3], rel=0.3)
    typed = cmtool("theory", "scaling", "--data", "gmm:1,1;-1,1;.5", "--T", "16,24", "--d", "1,2")
    assert typed.code == 0 and "sum to 2" in typed.err
    typed = cmtool("theory", "edm", "--data", "gmm:1,1;-1,1;.5", "--N", "5,9")
    assert typed.code == 0 and typed.err.count("sum to 2") == 1


def test_mlp_class_is_really_trained(cmtool):
    words = ["--family", "mlp", "--size", "2,24", "--T", "5", "--steps", "60", "--json"]
    rows = json.loads(cmtool("theory", "classes", *words).out)["tables"][0]["rows"]
    assert rows[0][4] > rows[1][4] > 0 and all(row[-1] for row in rows)


def test_chain_reads_points_and_leaves_w1_out_above_three_dimensions(cmtool, workdir):
    rng = np.random.default_rng(0)
    np.save(workdir / "plane.npy", rng.standard_normal((30, 2)))
    np.savez(workdir / "wide.npz", points=rng.standard_normal((30, 5)))
    np.savetxt(workdir / "line.txt", rng.standard_normal(30))
    words = ["--T", "10", "--count", "20", "--walks", "3", "--json"]
    plane = json.loads(cmtool("theory", "chain", "--data", "plane.npy", *words).out)
    assert plane["tables"][0]["rows"][0][1] > 0
    wide = json.loads(cmtool("theory", "chain", "--data", "wide.npz", *words).out)
    assert wide["tables"][0]["rows"][0][1] is None and "no W1 is estimated" in " ".join(wide["findings"])
    assert cmtool("theory", "chain", "--data", "line.txt", *words).code == 0


def test_plan_is_honest_about_each_number(cmtool):
    typed = cmtool("theory", "plan", "--dim", "2", "--eps", "0.1")
    assert typed.code == 0 and "does not say C1" in typed.out.replace("\n", " ") and "measured" in typed.out
    document = json.loads(cmtool("theory", "plan", "--dim", "2", "--eps", "0.1", "--json").out)
    assert document["gaussian"] == 29 and document["bound"] > 1e7


def test_check_passes_and_a_failure_is_an_exit_code(cmtool, monkeypatch):
    typed = cmtool("theory", "check", "--quick")
    assert typed.code == 0 and "PASS" in typed.out and "FAIL" not in typed.out
    monkeypatch.setattr("cmtool.theory.checks.run_checks", lambda quick: [near("K99", "wrong", 1.0, 2.0, 0.1)])
    typed = cmtool("theory", "check")
    assert typed.code == 1 and "FAIL" in typed.out and "Traceback" not in typed.err


def tiny_study(name: str) -> study.Study:
    fits = [power_law("W2 in d, T = 8", [1.0, 2.0, 4.0], [1.0, 1.4, 2.0], 2.5)]
    panel = study.Panel("p", "x", "y", [study.Curve("a", [1, 2], [1.0, 2.0]), study.Curve("b", [1, 2], [1, 2], "law")])
    table = study.Table("t <x>", ["n", "what"], [[1, "a"], [2.5, None]])
    return study.Study(name, f"About {name}", "Why?", [table], fits, [panel], ["Found <it>."])


def test_all_and_report_are_made_of_every_study(cmtool, workdir, monkeypatch):
    made = [tiny_study(name) for name in ("gap", "scaling")]
    monkeypatch.setattr("cmtool.theory.study.run_all", lambda: iter(made))
    typed = cmtool("theory", "all", "--out", "made")
    assert typed.code == 0 and typed.out.rstrip().endswith("made")
    assert {path.name for path in (workdir / "made").glob("*.json")} == {"gap.json", "scaling.json"}
    monkeypatch.setattr("cmtool.theory.checks.run_checks", lambda: [near("K01", "x", 1.0, 1.0, 0.1)])
    typed = cmtool("theory", "report", "--out", "page.html")
    page = (workdir / "page.html").read_text()
    assert typed.out == "page.html\n" and "Found &lt;it&gt;." in page and "t &lt;x&gt;" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "<script" not in page
    assert page.index('id="scaling"') < page.index('id="gap"') and "d<sup>0.50</sup> measured" in page


@pytest.mark.slow
def test_everything_within_its_budget(cmtool_process, workdir):
    typed = cmtool_process("theory", "all", "--out", "made", "--json")
    document = json.loads(typed.out)
    assert typed.code == 0 and len(document["studies"]) == 8
    assert len(list((workdir / "made").glob("*.png"))) == 8


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["scaling", "--T", "8"], ["T = 8", "c1", "T >= 9"]),
        (["scaling", "--T", "64", "--c1", "1000"], ["T = 64", "T >= 9119"]),
        (["scaling", "--T", "a"], ["--T: 'a'", "whole number"]),
        (["scaling", "--T", ""], ["--T", "empty entry"]),
        (["scaling", "--d", "0"], ["dimension"]),
        (["scaling", "--data", "laplace:0;1"], ["laplace", "gauss:MU;S"]),
        (["scaling", "--data", "gmm:-1,2;0,1;1"], ["non-negative"]),
        (["scaling", "--schedule", "cosin"], ["cosin", "cosine"]),
        (["scaling", "--start", "cold"], ["cold", "normal, exact"]),
        (["scaling", "--cov", "none.csv"], ["none.csv"]),
        (["scaling", "--cov", "bad.csv"], ["positive semidefinite"]),
        (["scaling", "--n", "100", "--data", "gmm:.5,.5;-1,1;.4"], ["Gaussian"]),
        (["scaling", "--schedule", "linear", "--T", "16,32"], ["linear", "T = 16"]),
        (["classes", "--family", "tree"], ["tree", "relu"]),
        (["classes", "--size", "0"], ["sizes"]),
        (["typical", "--c3", "-1"], ["c3"]),
        (["typical", "--data", "diracs:.5,.5;-1,1"], ["density"]),
        (["edm", "--N", "18"], ["two or more"]),
        (["gap", "--majority", "0.4"], ["majority"]),
        (["samplers", "--nfe", "4,8,12"], ["powers of two"]),
        (["chain", "--data", "none.npy"], ["none.npy"]),
        (["chain", "--data", "words.csv"], ["words.csv"]),
        (["chain", "--count", "3000", "--T", "10"], ["2000"]),
        (["plan", "--dim", "0", "--eps", "1"], ["dimension"]),
        (["plan", "--dim", "1", "--eps", "0"], ["positive"]),
        (["report", "--out", "nowhere/page.html"], ["nowhere", "report.html"]),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(cmtool, workdir, words, says):
    np.savetxt(workdir / "bad.csv", [[1.0, 2.0], [2.0, 1.0]], delimiter=",")
    (workdir / "words.csv").write_text("a,b\nc,d\n")
    typed = cmtool("theory", *words)
    assert typed.code in (1, 2) and typed.out == "" and "Traceback" not in typed.err
    for part in says:
        assert part in typed.err
    assert sorted(path.name for path in workdir.iterdir()) == ["bad.csv", "words.csv"]


def test_report_shows_every_cell():
    table = study.Table("t", ["a", "b"], [[1.23456789, True], [float("nan"), False]])
    page = report.table_html(table)
    assert "1.2346" in page and "yes" in page and "no" in page and "&ndash;" in page and 'class="number"' in page
