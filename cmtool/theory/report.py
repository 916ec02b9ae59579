"""One self-contained page: what the theorem says, what was measured, where the bound is loose."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from cmtool.theory.checks import Check
from cmtool.theory.figures import render
from cmtool.theory.study import Fit, Study, Table, fits_table

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5b6875; --line: #d9dfe5; --card: #ffffff; --page: #f5f7f9;
  --accent: #0072b2; --good: #1b7f4d; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaee; --soft: #9aa7b4; --line: #36414c; --card: #1b2229;
  --page: #12171c; --accent: #56b4e9; --good: #4cc38a; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; } h2 { font-size: 1.35rem; margin: 2.5rem 0 .25rem; }
p, ul { max-width: 46rem; } .lead { color: var(--soft); font-size: 1.1rem; }
.question { color: var(--soft); margin: 0 0 1rem; }
.formula { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--accent);
  border-radius: 6px; padding: .9rem 1.1rem; font-size: 1.1rem; overflow-x: auto; white-space: nowrap; }
figure { margin: 1rem 0; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: .75rem; }
figure img { display: block; width: 100%; height: auto; }
figure.single { max-width: 34rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  margin: .75rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .6rem .75rem; }
th, td { text-align: left; padding: .35rem .75rem; border-top: 1px solid var(--line); white-space: nowrap; }
td.number, th.number { text-align: right; } th { color: var(--soft); font-weight: 600; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--accent); }
.note { color: var(--soft); font-size: .875rem; }
.good { color: var(--good); } .bad { color: var(--bad); } nav a { margin-right: .9rem; color: var(--accent); }
code { background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: 0 .3em; }
"""

THEOREM = """
<p>A consistency model is trained level by level: f<sub>1</sub> is the identity, and f<sub>t</sub> learns to say at
noise level t what f<sub>t-1</sub> says one level lower, on the same image and the same noise. After T levels one
evaluation of f<sub>T</sub> turns pure noise into a sample. How far are those samples from the data?</p>
<p class="formula">W<sub>1</sub>( f<sub>T</sub>(X<sub>T</sub>), X<sub>1</sub> ) &nbsp;&le;&nbsp; C<sub>1</sub> &middot;
L<sub>f</sub><sup>3</sup> &middot; d<sup>5/2</sup> &middot; log<sup>5</sup>(T) / T &nbsp;+&nbsp; &epsilon; &nbsp;+&nbsp;
&epsilon;<sub>F</sub></p>
<p class="note">Li, Huang and Wei, <i>Towards a mathematical theory for consistency training in diffusion models</i>
(2024), Theorem 1. T counts noise levels, d dimensions; L<sub>f</sub> is the Lipschitz constant of the exact flow
maps; &epsilon; is the training error and &epsilon;<sub>F</sub> that of the function class, summed over the levels. The
bound is sufficient, not necessary; as a number it says nothing below T = 332,105 even for C<sub>1</sub> =
L<sub>f</sub> = d = 1, so exponents are what can be compared.</p>
"""


def show(value: Any) -> str:
    """A cell as text: five digits, a dash for nothing."""
    if value is None or (isinstance(value, float) and value != value):
        return "&ndash;"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.5g}" if isinstance(value, float) else escape(str(value))


def prose(text: str) -> str:
    """A sentence as HTML: T^-1, d^(1/2) and L_f get their superscripts and subscripts."""
    text = re.sub(r"\^(?:\(([^()]+)\)|(-?[\d.]*\d))", lambda found: f"<sup>{found[1] or found[2]}</sup>", escape(text))
    return re.sub(r"\b([A-Za-z]+)_([A-Za-z0-9]+)\b", r"<i>\1</i><sub>\2</sub>", text).replace("<sup>-", "<sup>&minus;")


def table_html(table: Table) -> str:
    """A table that scrolls on a narrow screen, with numbers aligned right."""
    numeric = [
        all(isinstance(row[i], (int, float)) or row[i] is None for row in table.rows) for i in range(len(table.columns))
    ]
    marks = [' class="number"' if number else "" for number in numeric]
    head = "".join(f"<th{mark}>{escape(name)}</th>" for name, mark in zip(table.columns, marks, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{mark}>{show(cell)}</td>" for cell, mark in zip(row, marks, strict=True)) + "</tr>"
        for row in table.rows
    )
    caption = f"<caption>{escape(table.title)}</caption>"
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def section(study: Study) -> str:
    """One study: question, findings, figure, main table; the other tables folded away."""
    findings = "".join(f"<li>{prose(text)}</li>" for text in study.findings)
    image = base64.b64encode(render(study, "svg")).decode() if study.panels else ""
    kind = ' class="single"' if len(study.panels) == 1 else ""
    picture = f'<img alt="{escape(study.title)}" src="data:image/svg+xml;base64,{image}">'
    figure = f"<figure{kind}>{picture}</figure>" if image else ""
    extra = [*([fits_table(study.fits)] if study.fits else []), *study.tables[1:]]
    folded = "".join(
        f"<details><summary>{escape(table.title)}</summary>{table_html(table)}</details>" for table in extra
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in study.notes)
    return (
        f'<section id="{study.name}"><h2>{escape(study.title)}</h2><p class="question">{escape(study.question)}</p>'
        f"<ul>{findings}</ul>{figure}{table_html(study.tables[0])}{folded}{notes}"
        f'<p class="note">Again: <code>cmtool theory {study.name}</code></p></section>'
    )


def _fit(studies: Sequence[Study], name: str, start: str) -> Fit | None:
    found = [fit for study in studies if study.name == name for fit in study.fits if fit.name.startswith(start)]
    return found[0] if found else None


def headlines(studies: Sequence[Study]) -> list[str]:
    """The page's findings in plain language, each from a fit of this run; without its study a finding is left out."""
    lines = []
    if fit := _fit(studies, "scaling", "W1 in T/log T"):
        lines.append(
            "The 1/T law is real and cannot be beaten: on Gaussian data the error falls as (T/log "
            f"T)^{fit.exponent:.3f}, and no noise schedule that covers the whole way gets below 1.23/T."
        )
    if fit := _fit(studies, "scaling", "W2 in d"):
        lines.append(
            f"The dimension is where the bound is loose: d^{fit.exponent:.2f} measured (exactly 1/2 for isotropic "
            "data), d^2.5 proved."
        )
    training, distilling = _fit(studies, "samplers", "CT in n"), _fit(studies, "samplers", "CD in n")
    if training and distilling:
        lines.append(
            "Training from data pays more than distillation on data with separate modes: its error falls only as "
            f"n^{training.exponent:.2f} where distillation with exact scores falls as n^{distilling.exponent:.2f}. On "
            "Gaussian data the two are the same."
        )
    if fit := _fit(studies, "samplers", "CT W1 in L_f"):
        lines.append(
            f"Sharper modes hurt training, but as L_f^{fit.exponent:.2f}, not as the cube that is proved; until the "
            "steps are finer than the modes' edges the law in T is T^(-1/2), not 1/T."
        )
    if fit := _fit(studies, "edm", "CD Heun"):
        lines.append(
            f"A second-order solver pays off in distillation alone (measured order {-fit.exponent:.2f}); training has "
            "no solver to improve."
        )
    return lines


def checks_table(checks: Sequence[Check]) -> Table:
    """All known answers with PASS or FAIL."""
    rows = [
        [c.id, c.what, c.kind, f"{c.value:.10g}", f"{c.expected:.10g}", "PASS" if c.passed else "FAIL"] for c in checks
    ]
    return Table("Known answers", ["id", "what", "kind", "value", "expected", "result"], rows)


def build_page(studies: Sequence[Study], checks: Sequence[Check]) -> str:
    """The whole page as HTML text; figures and styles are inside it, and it loads nothing."""
    passed = sum(check.passed for check in checks)
    verdict = "good" if passed == len(checks) else "bad"
    links = "".join(f'<a href="#{study.name}">{study.name}</a>' for study in studies)
    summary = "".join(f"<li>{prose(line)}</li>" for line in headlines(studies))
    folded = f"<details><summary>All {len(checks)} comparisons</summary>{table_html(checks_table(checks))}</details>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Consistency training: the theory against exact answers</title><style>{STYLE}</style></head><body><main>
<h1>Consistency training: the theory against exact answers</h1>
<p class="lead">What the convergence theorem promises, and what happens where everything can be computed.</p>
<nav>{links}<a href="#answers">known answers</a></nav>
<h2>What the theorem says</h2>{THEOREM}
<h2>What was measured</h2><ul>{summary}</ul>
{"".join(section(study) for study in studies)}
<section id="answers"><h2>Known answers</h2><p><strong class="{verdict}">{passed} of {len(checks)}</strong> comparisons
with closed forms, with a second numerical route, or with earlier values agree. The same formulas are the oracle of the
project's other tests.</p>{folded}</section>
</main></body></html>
"""
