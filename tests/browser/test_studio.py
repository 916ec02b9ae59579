"""The studio as a person uses it: open, draw, press, see, download; then type its command and get the same."""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.cli.tiny import write_model
from tests.conftest import ROOT, heeded_signals

READY = "return document.getElementById('status').textContent.startsWith('done')"
CHOOSE = (
    "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event(arguments[2]))"
)
RESULTS = "return [...document.querySelectorAll('#results img')].map(i => i.src)"


@pytest.fixture
def studio(workdir, browser):
    """The command itself, as a process, and its page in the browser."""
    model = write_model(workdir, "painter", resolution=16, num_classes=3, names=list("abc"))
    words = [sys.executable, "-m", "cmtool", "studio", "--no-browser", "--json", "--model", str(model)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with heeded_signals():
        process = subprocess.Popen(words, cwd=workdir, stdout=subprocess.PIPE, text=True, env=environment)
    document, line = "", ""
    while line != "}\n":
        line = process.stdout.readline()
        assert line, "the studio ended"
        document += line
    browser.open(json.loads(document)["url"])
    browser.until(READY)
    yield process
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0


def clicked(browser, selector):
    browser.run("document.getElementById('status').textContent = ''")
    browser.click(selector)
    browser.until(READY)


def pixels(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_draw_press_see_download_and_type_the_same(studio, browser, cmtool, workdir):
    before = pixels(browser.run("return document.getElementById('photo').toDataURL()"))[..., :3]
    browser.drag("#board", (-60, -60), (60, -60), (60, 60))
    painted = browser.run(
        "return [...document.getElementById('mask').getContext('2d').getImageData(0, 0, 16, 16).data].filter((v, i) => i % 4 == 3 && v > 0).length"
    )
    assert 8 <= painted < 200
    clicked(browser, "#inpaint")
    answers = [pixels(uri) for uri in browser.run(RESULTS)]
    assert len(answers) == 4 and not np.array_equal(answers[0], answers[1])
    assert (answers[0] != before).any(-1).sum() <= painted
    browser.click("#results a[download]")
    assert np.array_equal(np.asarray(Image.open(browser.download("inpaint-1.png"))), answers[0])
    command = browser.text("#command")
    for name in ("photo.png", "mask.png"):
        browser.click(f"#inputs a[download='{name}']")
        browser.download(name).rename(workdir / name)
    browser.click("#inputs a[download='command.txt']")
    assert browser.download("command.txt").read_text() == f"{command}\n"
    said = cmtool(*shlex.split(command)[1:])
    assert said.code == 0, said.err
    assert np.array_equal(np.asarray(Image.open(workdir / said.out.split()[0])), answers[0])
    assert browser.complaints() == []


def test_every_button_and_the_walk_answer(studio, browser):
    for task in ("superres", "colorize", "denoise"):
        clicked(browser, f"#{task}")
        assert len(browser.run(RESULTS)) == (1 if task == "denoise" else 4)
        assert f"edit {task}" in browser.text("#command")
    browser.click("#wipe")
    browser.run("document.getElementById('brush').value = 'paint'")
    browser.drag("#board", (-80, 0), (80, 0))
    clicked(browser, "#stroke")
    assert len(browser.run(RESULTS)) == 4
    browser.run("const p = document.getElementById('place'); p.value = 9; p.dispatchEvent(new Event('input'))")
    browser.until("return document.getElementById('walk').naturalWidth === 16")
    assert "interpolate --seeds 0,1 --num 25" in browser.text("#command")
    shown = browser.run("return document.getElementById('walk').src")
    browser.click("#walk-link a")
    assert np.array_equal(np.asarray(Image.open(browser.download("walk-9.png"))), pixels(shown))
    assert browser.complaints() == []


def test_the_class_is_chosen_for_samples_edits_and_the_walk(studio, browser):
    browser.run("const p = document.getElementById('place'); p.value = 9; p.dispatchEvent(new Event('input'))")
    browser.until("return document.getElementById('walk').naturalWidth === 16")
    before = browser.run("return document.getElementById('walk').src")
    browser.run(CHOOSE, "class", "b", "change")
    browser.until("return document.getElementById('walk').src !== arguments[0]", before)
    browser.until("return document.getElementById('command').textContent.includes('--label b')")
    for selector, command in (("#new", "sample --seeds"), ("#superres", "edit superres")):
        clicked(browser, selector)
        assert command in browser.text("#command") and "--label b" in browser.text("#command")


def test_the_brush_follows_the_color_and_keys_undo(studio, browser):
    read = "return document.getElementById('photo').toDataURL()"
    first = browser.run(read)
    browser.run(CHOOSE, "color", "#00ff00", "input")
    assert browser.run("return document.getElementById('brush').value") == "paint"
    browser.drag("#board", (-60, 0), (60, 0))
    assert browser.run(read) != first
    browser.run("document.dispatchEvent(new KeyboardEvent('keydown', { key: 'z', ctrlKey: true }))")
    assert browser.run(read) == first
    assert browser.complaints() == []


def test_no_option_of_the_command_is_broken(studio, browser):
    """A line that ends in "--" reads as another option."""
    clicked(browser, "#superres")
    tall = """const words = [...document.querySelectorAll('#command span')], line = words[0].offsetHeight;
        return [words.length, words.filter(w => w.textContent.startsWith('-') && w.offsetHeight > line).length]"""
    for width in (400, 1400):
        browser.emulate(width, 900, False)
        assert browser.run(tall) == [14, 0]


def test_mistakes_are_said_and_undone_and_the_page_fits_a_phone(studio, browser):
    browser.run("document.getElementById('status').textContent = ''")
    browser.click("#inpaint")
    browser.until("return document.getElementById('status').classList.contains('bad')")
    assert "the mask is empty" in browser.text("#status")
    read = "return document.getElementById('photo').toDataURL()"
    first = browser.run(read)
    browser.click("#wipe")
    assert browser.run(read) != first
    browser.click("#undo")
    assert browser.run(read) == first
    for width in (400, 1400):
        for dark in (False, True):
            browser.emulate(width, 900, dark)
            assert browser.run("return document.documentElement.scrollWidth - window.innerWidth") <= 0
