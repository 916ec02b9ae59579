"""`cmtool report`: one page with everything inside, from whole and half-made runs."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.reporting.run_makers import write_evaluation, write_grids, write_run

VOID = {"meta", "img", "input", "br", "link"}


class Checker(HTMLParser):
    """Counts open elements, and keeps every address and identifier."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.ids, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.addresses += [given[key] for key in ("src", "href") if key in given]
        self.ids += [given["id"]] if "id" in given else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    checker = Checker()
    checker.feed(Path(path).read_text(encoding="utf-8"))
    assert checker.open == []
    return checker


@pytest.fixture
def run(workdir):
    folder = write_run("runs", "digits-ict", log="start <script>alert(1)</script>")
    write_grids(folder, (40, 80, 100))
    write_evaluation(folder)
    return folder


def test_a_page_has_every_part_and_no_address_outside_itself(cmtool, run):
    said = cmtool("report")
    assert said.code == 0, said.err
    assert said.out.strip() == "report.html"
    page = read("report.html")
    wanted = {"overview", "curves", "progress", "steps", "nearest", "evaluation", "configuration", "environment"}
    assert set(page.ids) == wanted
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    text = "".join(page.text)
    for words in ("Loss", "Distance per noise level", "Learning rate", "Frechet distance while training", "12.5",
                  "train.ema", "2.15.0", "all 1,797 training images"):  # fmt: skip
        assert words in text, words
    assert "<script>alert" not in Path("report.html").read_text(encoding="utf-8")


def test_several_runs_are_overlaid(cmtool, run):
    write_run("runs", "other", sets=["train.lr=1e-4"], finished=False)
    Path("runs/notes.txt").write_text("no run", encoding="utf-8")
    said = cmtool(
        "report", "runs/digits-ict", "runs/other", "runs/notes.txt", "--out", "two.html", "--no-samples", "--json"
    )
    document = json.loads(said.out)
    assert [entry["finished"] for entry in document["runs"]] == [True, False]
    assert "notes.txt" in document["passed_over"][0]
    text = Path("two.html").read_text(encoding="utf-8")
    loss = text[text.index("<figcaption>Loss") :].split("</figure>")[0]
    assert loss.count("<polyline") == 2
    assert "What differs between digits-ict and other" in text
    assert 'id="steps"' not in text


def test_what_repeats_a_run_is_in_the_environment(cmtool, run):
    said = {"command": ["/bin/cmtool", "train-ct", "--set", "a b"], "device": "abacus", "threads": 3,
            "versions": {"numpy": "1.2.3"}}  # fmt: skip
    (run / "run.log").write_text(f"2026 start at step 0 of 100 {json.dumps(said)}\n", encoding="utf-8")
    assert cmtool("report", "--no-samples").code == 0
    text = "".join(read("report.html").text)
    for words in ("cmtool train-ct --set 'a b'", "abacus", "1.2.3", "version of torch2.15.0"):
        assert words in text, words


@pytest.mark.parametrize("start", ["[1]", '{"command": 3, "versions": [1]}', '{"command": "rm -rf", "versions": {"a": {}}}',
                                   "{cut off", "{}"])  # fmt: skip
def test_a_log_that_says_something_else_is_no_matter(cmtool, run, start):
    (run / "run.log").write_text(f"2026 start at step 0 of 100 {start}\n", encoding="utf-8")
    assert cmtool("report", "--no-samples").code == 0
    assert "seed" in "".join(read("report.html").text)


def test_the_distance_of_a_small_network_is_never_called_fid(cmtool, run):
    assert cmtool("report", "--no-samples").code == 0
    page = Path("report.html").read_text(encoding="utf-8")
    chart = page[page.index("<figcaption>Frechet distance") :].split("</figure>")[0]
    assert ">FD</text>" in chart and "FID" not in chart


def test_the_same_runs_give_the_same_page(cmtool, run):
    from cmtool.reporting.page import Gallery, render
    from cmtool.reporting.runs import read_run

    pages = {render([read_run(run)], [Gallery()], now=lambda: 0.0) for _ in range(2)}
    assert len(pages) == 1
    assert "1970-01-01" in pages.pop()


def test_points_are_scatter_pictures_without_neighbors(cmtool):
    sets = ["network.kind=mlp", "network.channels=16", "network.num_blocks=1"]
    write_run("runs", "points", preset="toy2d", recipe="ict", sets=sets)
    assert cmtool("report", "runs/points").code == 0
    page = read("report.html")
    assert "nearest" not in page.ids and "steps" in page.ids


def test_mistakes_are_one_sentence(cmtool, workdir):
    assert "there is no run" in cmtool("report").err
    assert cmtool("report", "nowhere").code == 1
    write_run("runs", "a")
    said = cmtool("report", "runs/a", "--out", "page.pdf")
    assert said.code == 2 and ".html" in said.err
    assert not Path("page.pdf").exists()


def test_a_guided_teacher_is_shown_by_guided_samples(cmtool, workdir):
    for name in ("teacher", "weak"):
        write_run("runs", name, recipe="edm")
    write_run("runs", "student")
    guided = ("--guidance", "2", "--weak", "runs/weak")
    said = cmtool("report", "runs/teacher", "runs/student", *guided)
    assert said.code == 0 and "student: --weak changes a teacher's slope" in said.err
    assert Path("report.html").read_text(encoding="utf-8").count(", guidance 2)") == 2  # of one picture, told and shown
    said = cmtool("report", "runs/teacher", *guided[2:], "--out", "other.html")
    assert said.code == 2 and "there is none" in said.err and not Path("other.html").exists()


def test_a_teacher_has_no_grid_to_show(cmtool, workdir):
    write_run("runs", "teacher", recipe="edm")
    write_run("runs", "student")
    for names, shown in ((("teacher",), 0), (("teacher", "student"), 1)):
        assert cmtool("report", *(f"runs/{name}" for name in names), "--no-samples").code == 0
        assert Path("report.html").read_text(encoding="utf-8").count("<figcaption>Grid points N<") == shown
