"""`cmtool.train`: the same run as the command's, talked about only to whoever listens."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

import cmtool as package
from cmtool.cli.train import TrainOptions
from cmtool.errors import ConfigError, DataError, UsageError, UserError
from cmtool.training.report import Listener
from tests.training.tiny import FLAGS

SMALL = {"network.channels": 8, "network.head_channels": 8, "data.size": 64}
SHORT = {"settings": SMALL, "steps": 6, "batch_size": 8, "device": "cpu"}


class Heard:
    """A Talk that remembers."""

    def __init__(self):
        self.said, self.warned, self.bars = [], [], []

    def say(self, text):
        self.said.append(text)

    def warn(self, text):
        self.warned.append(text)

    @contextmanager
    def progress(self, total, description=""):
        moves = []
        self.bars.append((total, description, moves))
        yield lambda advance=1, note="", completed=None: moves.append(completed)


def test_the_model_is_the_command_s_to_the_byte(cmtool, capfd):
    run = package.train(recipe="edm", out="a", **SHORT)
    assert capfd.readouterr() == ("", "")
    assert run.finished and run.model == Path("a/model.safetensors") and (run.step, run.signal) == (6, 0)
    assert run.config.recipe_name == "edm" and run.folder == Path("a")
    typed = cmtool("train-edm", *FLAGS, "--steps", 6, "--batch-size", 8, "--device", "cpu", "--out", "b")
    assert typed.code == 0, typed.err
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
    assert Path("a/config.toml").read_text() == Path("b/config.toml").read_text()
    assert package.load(run.model).sample(2).shape == (2, 1, 8, 8)


def test_a_talk_hears_what_the_terminal_shows(cmtool):
    heard = Heard()
    package.train(recipe="edm", out="a", talk=heard, **SHORT)
    typed = cmtool("train-edm", *FLAGS, "--steps", 6, "--batch-size", 8, "--device", "cpu", "--out", "b")
    lines = [line.replace(" b/", " a/") for line in typed.err.splitlines()]
    assert [line for line in lines if line.split(":")[0] not in ("next", "then")] == heard.said
    ((total, description, moves),) = heard.bars
    assert (total, description, moves[-1]) == (6, "digits edm", 6) and not heard.warned


def test_a_listener_gets_numbers(workdir):
    seen = []

    class Losses(Listener):
        def report(self, report):
            seen.append((report.step, report.loss))

    package.train(recipe="edm", out="a", listener=Losses(), **{**SHORT, "settings": {**SMALL, "train.log_every": 2}})
    assert [step for step, _ in seen] == [2, 4, 6] and all(loss > 0 for _, loss in seen)


def test_the_same_call_goes_on_and_then_has_nothing_to_do(workdir):
    whole = package.train(recipe="edm", out="whole", **SHORT)
    stopped = package.train(recipe="edm", out="a", max_time=1e-9, **SHORT)
    assert stopped.model is None and not stopped.finished and stopped.out_of_time and stopped.step < 6
    done = package.train(recipe="edm", out="a", max_time="1h", **SHORT)
    assert done.finished and not done.was_finished
    assert done.model.read_bytes() == whole.model.read_bytes()
    again = package.train(recipe="edm", out="a", **SHORT)
    assert again.finished and again.was_finished and again.step == 6
    longer = package.train(extend="a", steps=9, name="b", device="cpu")
    assert longer.step == 9 and longer.folder == Path("runs/b")


def test_your_own_pictures_with_classes(workdir):
    for name in ("cats", "dogs"):
        Path("photos", name).mkdir(parents=True)
        for index in range(4):
            Image.effect_noise((20, 16), 60 + index).convert("RGB").save(f"photos/{name}/{index}.png")
    heard = Heard()
    sets = ["network.channels=8", "network.head_channels=8", "network.group_channels=1"]
    run = package.train("photos", preset="shapes", recipe="ict", settings=sets, steps=2, batch_size=4, talk=heard)
    assert run.folder == Path("runs/shapes-ict")
    model = package.load(run.model)
    assert model.class_names == ["cats", "dogs"] and model.header["data"]["path"] == "photos"
    assert sum("no sampling times are searched" in line for line in heard.said) == 1


def test_a_dry_run_settles_everything_and_writes_nothing(workdir):
    run = package.train(dry_run=True, settings={"train.lr": 0.5})
    assert run.config.train.lr == 0.5 and run.config.family == "ct" and run.origins["train.lr"] == "settings train.lr"
    assert run.folder == Path("runs/digits-ict-pm") and not list(Path().iterdir())


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"settings": {"train.lrr": 1}}, ConfigError, "settings train.lrr"),
        ({"settings": {"train.lr": "fast"}}, ConfigError, "settings train.lr = 'fast'"),
        ({"settings": ["train.lr"]}, ConfigError, "must look like key=value"),
        ({"preset": "digist"}, ConfigError, "Did you mean digits?"),
        ({"family": "cd"}, ConfigError, "needs a teacher"),
        ({"family": "edm", "recipe": "ict"}, ConfigError, "belongs to train-ct"),
        ({"preset": "folder64"}, DataError, "needs a path"),
        ({"data": "nowhere", "preset": "folder64"}, DataError, "there is no data at nowhere"),
        ({"out": "a", "name": "b"}, UsageError, "both say where"),
        ({"max_time": "soon"}, UsageError, "no time span"),
        ({"track": ["tensorbord"]}, UsageError, "Did you mean tensorboard?"),
        ({"device": "gpu"}, UserError, "unknown device"),
        ({"settings": {"train.batch_size": 8, "train.micro_batch": 16}}, ConfigError, "micro_batch = 16 is larger"),
        ({"extend": "nowhere"}, UserError, "no run folder"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(workdir, how, error, says):
    with pytest.raises(error) as raised:
        package.train(**how)
    assert says in str(raised.value) and not list(Path().rglob("*"))


def test_beside_the_main_thread(workdir):
    found = []
    worker = threading.Thread(target=lambda: found.append(package.train(recipe="edm", out="a", **SHORT)))
    worker.start()
    worker.join()
    assert found[0].finished


def test_it_is_documented_and_offers_what_the_command_offers(workdir):
    parameters = inspect.signature(package.train).parameters
    shown = {"list_recipes", "requeue_exit_code", "json", "quiet"}
    renamed = {"sets": "settings"}
    options = {renamed.get(name, name) for name in TrainOptions.__dataclass_fields__} - shown
    assert options <= set(parameters)
    assert all(f"\n    {name}: " in inspect.getdoc(package.train) for name in parameters)
    with pytest.raises(TypeError, match="stepps"):
        package.train(stepps=3)


def test_settling_needs_no_torch(tmp_path):
    code = "import sys, cmtool; cmtool.train(dry_run=True); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    "asked", ["machine.device.choose_device", "training.inherit.check_needs", "training.forecast.forecast"]
)
def test_a_start_asks_each_thing_once(monkeypatch, tmp_path, asked):
    importlib.import_module("cmtool.training.session")
    importlib.import_module("cmtool.training.setup")
    home, _, name = asked.rpartition(".")
    real, calls = getattr(importlib.import_module(f"cmtool.{home}"), name), []
    # Wherever it was imported by name: a second caller must not go uncounted.
    for module in [module for key, module in sys.modules.items() if key.startswith("cmtool.")]:
        if vars(module).get(name) is real:
            monkeypatch.setattr(module, name, lambda *given: calls.append(given) or real(*given))
    package.train(recipe="edm", out=tmp_path / "a", **SHORT)
    assert len(calls) == 1
