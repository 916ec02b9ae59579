"""The report as a person sees it: in a window, light and dark, narrow and wide, with its slider moved."""

from __future__ import annotations

from tests.reporting.run_makers import write_evaluation, write_grids, write_run

OVERFLOW = "return document.documentElement.scrollWidth - window.innerWidth"
# Labels that reach out of their card, or out of a drawing that hides what does.
CUT = """return [...document.querySelectorAll('.chart text')].filter(t => {
    const svg = t.ownerSVGElement, hides = getComputedStyle(svg).overflow !== 'visible';
    const room = (hides ? svg : svg.closest('.chart')).getBoundingClientRect(), box = t.getBoundingClientRect();
    return box.width > 0 && (box.left < room.left - 1 || box.right > room.right + 1);
}).map(t => t.textContent)"""
GROUND = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"


def test_the_report_is_whole_at_every_width_and_scheme_and_its_slider_moves(browser, cmtool, workdir):
    folder = write_run("runs", "digits-ict")
    write_grids(folder, (40, 80, 100))
    write_evaluation(folder)
    assert cmtool("report", "--out", "report.html").code == 0
    address = (workdir / "report.html").as_uri()
    brightness = {}
    for width in (400, 1400):
        for dark in (False, True):
            browser.emulate(width, 900, dark)
            browser.open(address)
            assert browser.run(OVERFLOW) <= 0, f"the page is wider than {width} pixels"
            assert browser.run(CUT) == [], f"labels of a chart are cut at {width} pixels"
            brightness[width, dark] = browser.run(GROUND)
    assert brightness[400, False] > 600 > 200 > brightness[400, True]
    assert browser.run("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.run("return document.querySelectorAll('.chart svg').length") >= 7
    slide(browser)
    assert browser.complaints() == []
    assert not [url for url in browser.requested() if not url.startswith(("file:", "data:"))]


def test_several_runs_of_one_grid_each_need_no_slider_and_raise_no_error(browser, cmtool, workdir):
    for name in ("a", "b"):
        write_grids(write_run("runs", name), (100,))
    assert cmtool("report", "runs/a", "runs/b", "--no-samples", "--out", "report.html").code == 0
    for width in (400, 1400):
        browser.emulate(width, 900, False)
        browser.open((workdir / "report.html").as_uri())
        assert browser.run(OVERFLOW) <= 0
    assert browser.run("return document.querySelectorAll('.slider').length") == 2
    assert browser.complaints() == []


def slide(browser):
    """Move the slider by its keys and see another picture and another step."""
    assert browser.text(".slider output") == "step 100"
    last = browser.run("return document.querySelector('.slider img').src")
    browser.type(".slider input", "\ue012")  # arrow left
    assert browser.text(".slider output") == "step 80"
    assert browser.run("return document.querySelector('.slider img').src") != last
    browser.type(".slider input", "\ue011")  # home
    assert browser.text(".slider output") == "step 40"
