"""How far it is from what is typed to where the work is done: frames and files, counted by tracing a real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Runs the command as `python -m cmtool` does, and leaves as soon as the wanted function of the package is entered.
TRACER = """
import json, os, runpy, sys

package, file, function, *sys.argv = sys.argv[1:]

def way(frame):
    while frame is not None:
        yield os.path.relpath(frame.f_code.co_filename, package), frame.f_code.co_qualname if hasattr(
            frame.f_code, "co_qualname") else frame.f_code.co_name
        frame = frame.f_back

def watch(frame, event, argument):
    if event == "call" and frame.f_code.co_name == function and frame.f_code.co_filename == os.path.join(package, file):
        found = [list(step) for step in way(frame) if not step[0].startswith("..")]
        os.write(1, json.dumps(found[::-1]).encode())
        os._exit(0)

sys.setprofile(watch)
runpy.run_module("cmtool", run_name="__main__", alter_sys=True)
"""


def way_to(folder: Path, file: str, function: str, *words: str) -> list[tuple[str, str]]:
    """Return (file, function) of the package's frames from `app.run` to the first call of a function."""
    command = [sys.executable, "-c", TRACER, str(ROOT / "cmtool"), file, function, "cmtool", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("["), done.stderr
    steps = [(step[0], step[1]) for step in json.loads(done.stdout)]
    return steps[next(i for i, step in enumerate(steps) if step == ("cli/app.py", "run")) :]


def test_from_the_shell_to_the_loss(tmp_path):
    way = way_to(tmp_path, "losses/distance.py", "pseudo_huber", "train-ct", "--preset", "digits", "--steps", "4")
    assert len(way) <= 11, "\n".join(f"{file}: {function}" for file, function in way)
    assert len({file for file, _ in way}) <= 6, sorted({file for file, _ in way})
    names = [function.rpartition(".")[2] for _, function in way]
    assert names[0] == "run" and names[-1] == "pseudo_huber"
    assert {"train_as", "step", "loss", "measure", "between"} <= set(names)
