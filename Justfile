# Shortcuts; `just` alone lists them.

default:
    @just --list

# Everything that must pass before a change is taken
check:
    .ci/run

# The quick tests, on all cores
test *words:
    pytest {{words}}

# The tests that take minutes
slow:
    pytest -m slow

# Format and lint
fix:
    ruff check --fix . && ruff format .

# Types
types:
    mypy

# The documentation, live
docs:
    mkdocs serve

# Wheel and source archive in dist/
package:
    python -m pip install -q build && python -m build

# A page about every run
report:
    cmtool report runs/* --out report.html
