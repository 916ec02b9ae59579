"""No input to any reader gives a traceback, a hang, a gigabyte, a program run or a file outside its folder."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmtool.checkpoint import read_header
from cmtool.cli.failure import describe
from cmtool.config.load import resolve
from cmtool.config.toml import parse_value
from cmtool.errors import UserError
from cmtool.interop.pickles import read_pickle
from cmtool.training.run_folder import RunFolder
from tests.fuzz.sandbox import TRIED, Found, Reader, attack

NAMES = (
    *("safetensors", "config.toml", "preset", "--set", "metrics.jsonl", "run.lock", "png", "jpeg", "gif"),
    *("webp, tiff, bmp", "image zip", "data npz", "samples npz", "samples zip", "packed", "data pickle"),
    *("network pickle", "torch", "foreign", "msgpack", "diffusers", "lmdb", "dataset.json", "class map", "statistics"),
    *("points", "points in words", "a whole run", "request.json", "shard", "studio"),
    *(("parquet", "arrow") if find_spec("pyarrow") else ()),
)
ROOT = Path(__file__).resolve().parents[2]
# Two thirds at random, one third guided by the lines that inputs reach; a setting resolves a whole preset and a request
# of the page makes pictures, so these get less.
PLAIN, GUIDED = 2800, 1300
SLOWER = {"--set": 10, "studio": 20}


def check(found: Found | None) -> None:
    assert found is None, f"{found.why}\nafter the input {found.data[:300]!r} ({len(found.data)} bytes)"


def test_every_reader_is_attacked(known):
    assert set(NAMES) == known.keys()


@pytest.mark.parametrize("name", NAMES)
def test_changed_examples(known, tmp_path, name):
    check(attack(known[name], tmp_path, 40, seed=0))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_changed_examples(known, tmp_path, name):
    check(attack(known[name], tmp_path, PLAIN // SLOWER.get(name, 1), seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_examples_that_grow_with_the_lines_they_reach(known, tmp_path, name):
    check(attack(known[name], tmp_path, GUIDED // SLOWER.get(name, 1), seed=2, guided=True))


@pytest.mark.slow
def test_the_slow_tier_tries_a_hundred_thousand():
    assert sum((PLAIN + GUIDED) // SLOWER.get(name, 1) for name in NAMES) >= 100_000


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("atheris"), reason="atheris is not installed (pip install '.[fuzz]')")
@pytest.mark.parametrize("name", ["faulty", "safetensors", "msgpack", "lmdb", "network pickle", "packed"])
def test_guided_by_coverage(name, tmp_path):
    """Half a minute of libFuzzer each; it must find the reader that is at fault."""
    words = [sys.executable, "-m", "tests.fuzz.guided", name, "-max_total_time=30"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace")
    tried = re.findall(r"^#(\d+)", done.stderr, re.MULTILINE)
    TRIED["guided by coverage"] += int(tried[-1]) if tried else 0
    if name == "faulty":
        assert done.returncode != 0 and "the fault that must be found" in done.stdout + done.stderr
    else:
        assert done.returncode == 0 and tried, done.stderr[-3000:]


# --- the sandbox itself: an attack that cannot fail proves nothing ------------------------------------------------


def run_a_program(path):
    os.system("true")


def evaluate(path):
    eval(path.read_bytes()[:0] or "1 + 1")


def unpickle(path):
    pickle.loads(b"cos\nsystem\n(S'true'\ntR.")


def write_elsewhere(path):
    (path.parent.parent.parent / "outside").write_text("x")


def take_memory(path):
    bytearray(3 << 30)


def hang(path):
    time.sleep(30)


def fall_over(path):
    raise KeyError("x")


def say_nothing(path):
    raise UserError("")


def die(path):
    os._exit(0 if len(path.read_bytes()) == 3 else 9)


@pytest.mark.parametrize(
    ("reader", "why"),
    [
        (run_a_program, "os.system"),
        (evaluate, "exec"),
        (unpickle, "os.system"),
        (write_elsewhere, "writes"),
        (take_memory, "MemoryError"),
        (fall_over, "KeyError"),
        (say_nothing, "one sentence"),
        (die, "died without a word"),
        (hang, "longer than"),
    ],
)
def test_the_sandbox_notices(tmp_path, monkeypatch, reader, why):
    monkeypatch.setattr("tests.fuzz.sandbox.SECONDS", 0.3)
    armed = []
    victim = Reader("itself", "f", (b"abc",), lambda path: reader(path) if armed else armed.append(os.getpid()))
    found = attack(victim, tmp_path / "deep" / "er", 2, seed=0)
    TRIED.pop("itself")
    assert found is not None and why in found.why


# --- structured inputs ---------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(preamble=st.dictionaries(st.sampled_from(["__metadata__", "a", "b"]), VALUES | st.fixed_dictionaries({"data_offsets": VALUES, "dtype": VALUES, "shape": VALUES}), max_size=3), tail=st.binary(max_size=20))  # fmt: skip
def test_any_preamble_is_read_or_refused(tmp_path, preamble, tail):
    text = json.dumps(preamble).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + tail)
    TRIED["hypothesis"] += 1
    try:
        read_header(path)
    except UserError as error:
        assert "\n" not in error.message


@quick
@given(header=VALUES | st.fixed_dictionaries({"format": VALUES}))
def test_any_header_is_read_or_refused(tmp_path, header):
    text = json.dumps({"__metadata__": {"cmtool": json.dumps(header)}}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    TRIED["hypothesis"] += 1
    try:
        assert isinstance(read_header(path), dict)
    except UserError as error:
        assert "\n" not in error.message


@quick
@given(key=st.sampled_from(["train.lr", "train.betas", "recipe.gap", "network.channel_mult", "train.ema", "sample.times"]), value=VALUES)  # fmt: skip
def test_any_setting_is_taken_or_refused_in_one_sentence(key, value):
    TRIED["hypothesis"] += 1
    try:
        resolve("digits", family="ct", sets=[f"{key}={value}"])
    except UserError as error:
        assert error.message


@quick
@given(text=st.text(max_size=40))
def test_any_text_is_a_value(text):
    TRIED["hypothesis"] += 1
    parse_value(text)


@quick
@given(lines=st.lists(VALUES.map(json.dumps) | st.text(max_size=20), max_size=6))
def test_any_metrics_are_read(tmp_path, lines):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    TRIED["hypothesis"] += 1
    assert all(isinstance(row["step"], int) for row in folder.rows())
    folder.forget_after(2)


@quick
@given(
    content=VALUES | st.binary(max_size=20) | st.tuples(st.integers(), st.binary(max_size=3)),
    protocol=st.integers(0, 5),
)
def test_plain_pickles_are_read_and_give_the_same(tmp_path, content, protocol):
    path = tmp_path / "n.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    TRIED["hypothesis"] += 1
    try:
        read = read_pickle(path)
    except UserError as error:
        assert "it names '_" in error.message  # protocols 0 to 2 spell bytes as a call
    else:
        assert repr(read) == repr(content)


class Calls:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [os.system, eval, exec, print, getattr, __import__, open])
def test_pickles_that_call_are_refused_and_call_nothing(known, tmp_path, function, protocol):
    marker = tmp_path / "marker"
    for reader in ("network pickle", "data pickle", "torch", "foreign"):
        path = tmp_path / known[reader].file
        path.write_bytes(pickle.dumps({"a": Calls(function, f"touch {marker}")}, protocol))
        try:
            known[reader].read(path)
        except UserError as error:
            assert describe(error).sentence.isprintable()
        else:  # genuine network pickles name getattr; an inert record stands in for it
            assert function is getattr
        assert not marker.exists()


@pytest.mark.parametrize(
    "opcode", [b"r\xff\xff\xff\x1f", b"\x95" + b"\xff" * 7 + b"\x1f", b"\x8e" + b"\xff" * 5 + b"\x00" * 3]
)
def test_pickles_that_claim_memory_do_not_get_it(known, tmp_path, opcode):
    """A memo index of half a billion, a frame and a byte string longer than any file."""
    for reader in ("network pickle", "data pickle"):
        bomb = Reader(reader, known[reader].file, (b"\x80\x04}" + opcode + b".",), known[reader].read)
        check(attack(bomb, tmp_path / reader, 1, seed=0))
