"""The file format: what is written is read back, damage of any bit is named, and no writer leaves half a file."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys

import pytest
import torch

from cmtool import checkpoint
from cmtool.checkpoint import load_tensors, model_hash, read_header, resolve_file, save_model
from cmtool.errors import CheckpointError, UserError
from cmtool.files import atomic
from cmtool.files.atomic import atomic_bytes, atomic_write

HEADER = {"kind": "consistency", "step": 3, "preset": "digits", "times": {"2": [80.0, 0.8]}}


@pytest.fixture
def model_file(tmp_path):
    tensors = {
        "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
        "b": torch.tensor(2.5, dtype=torch.float64),
        "half": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "steps": torch.tensor([1, 2**40]),
        "none": torch.empty(0, 3),
    }
    path = tmp_path / "model.safetensors"
    save_model(path, tensors, HEADER)
    return path, tensors


def leftovers(folder):
    """Names of files beyond the finished ones."""
    return [name for name in os.listdir(folder) if name.startswith(".") or "tmp" in name]


def test_round_trip_to_the_bit(model_file):
    path, tensors = model_file
    read, header = load_tensors(path)
    assert header == {"format": 1, **HEADER}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)


def test_special_values_and_memory_formats_survive(tmp_path):
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    images = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    tensors = {"odd": odd, "last": images.to(memory_format=torch.channels_last), "turned": images.mT, "same": odd}
    save_model(tmp_path / "m.safetensors", tensors, HEADER)
    read, _ = load_tensors(tmp_path / "m.safetensors")
    assert torch.equal(read["odd"].view(torch.int32), odd.view(torch.int32))
    assert torch.equal(read["last"], images) and torch.equal(read["turned"], images.mT)
    assert torch.equal(read["same"].view(torch.int32), odd.view(torch.int32))


def test_the_header_is_read_without_torch(model_file):
    path, _ = model_file
    code = (
        "import sys; from cmtool.checkpoint import read_header, model_hash\n"
        f"header = read_header({str(path)!r}); assert header['step'] == 3\n"
        f"assert len(model_hash({str(path)!r})) == 12\n"
        "heavy = {'torch', 'numpy', 'safetensors', 'pydantic'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=checkpoint.__file__.rsplit("/cmtool/", 1)[0])


def test_the_header_is_where_the_format_says(model_file):
    path, _ = model_file
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    assert json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["cmtool"])["kind"] == "consistency"


def test_the_same_model_gives_the_same_bytes_and_another_one_another_hash(model_file, tmp_path):
    path, tensors = model_file
    save_model(tmp_path / "again.safetensors", tensors, HEADER)
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    save_model(tmp_path / "later.safetensors", tensors, HEADER | {"step": 4})
    assert model_hash(path) != model_hash(tmp_path / "later.safetensors")


def test_every_flipped_bit_is_noticed(model_file):
    path, _ = model_file
    good = path.read_bytes()
    missed = []
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        path.write_bytes(bad)
        try:
            load_tensors(path)
        except CheckpointError as error:
            assert "\n" not in error.message and str(path) in error.message
        else:
            missed.append(position)
    # The padding after safetensors' JSON carries nothing; every other byte must be covered.
    length = struct.unpack("<Q", good[:8])[0]
    assert all(good[8 + length - 8 : 8 + length].endswith(b" ") and position < 8 + length for position in missed)
    assert len(missed) <= 8


def test_every_truncation_is_noticed(model_file):
    path, _ = model_file
    good = path.read_bytes()
    for length in [*range(0, 64), *range(64, len(good), 37), len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            load_tensors(path)
        with pytest.raises(CheckpointError):
            read_header(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        read_header(path)


@pytest.mark.parametrize(
    ("preamble", "says"),
    [
        (b"[]", "no safetensors file"),
        (b"{}", "no cmtool model"),
        (b'{"__metadata__": {"format": "pt"}}', "no cmtool model"),
        (b'{"__metadata__": []}', "no cmtool model"),
        (b'{"__metadata__": {"cmtool": "{"}}', "header cannot be read"),
        (b'{"__metadata__": {"cmtool": "[]"}}', "header cannot be read"),
        (b'{"__metadata__": {"cmtool": "{}"}}', "header cannot be read"),
        (b'{"__metadata__": {"cmtool": "{\\"format\\": 99}"}}', "format 99"),
        (b'{"a": 3}', "no safetensors file"),
        (b'{"a": {"data_offsets": "x"}}', "no safetensors file"),
        (b"[" * 100_000, "no safetensors file"),
        (b"\xff\xfe", "no safetensors file"),
    ],
)
def test_strange_headers_are_one_sentence(tmp_path, preamble, says):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(preamble)) + preamble)
    with pytest.raises(CheckpointError, match=says):
        read_header(path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_header(tmp_path / "no.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)
    with pytest.raises(CheckpointError, match="there is no model"):
        resolve_file(tmp_path / "no")
    with pytest.raises(CheckpointError, match="holds no model"):
        resolve_file(tmp_path)
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(CheckpointError, match="has not finished"):
        resolve_file(tmp_path)


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    atomic_bytes(path, b"old")
    with pytest.raises(RuntimeError, match="halfway"), atomic_write(path) as temporary:
        temporary.write_bytes(b"new, hal")
        raise RuntimeError("halfway")
    assert path.read_bytes() == b"old" and not leftovers(tmp_path)


def test_the_new_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "file.bin"
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"x" * 10)
        assert not path.exists() and temporary.parent == path.parent and temporary.suffix == path.suffix
    assert path.read_bytes() == b"x" * 10 and not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "disk is full"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.EIO, "could not be written"),
    ],
)
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_refusals_of_the_system_are_one_sentence(tmp_path, monkeypatch, number, says, where):
    path = tmp_path / "model.safetensors"
    save_model(path, {"a": torch.zeros(3)}, HEADER)
    before = path.read_bytes()

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, where, refuse)
    with pytest.raises(UserError, match=says):
        save_model(path, {"a": torch.ones(3)}, HEADER)
    monkeypatch.undo()
    assert path.read_bytes() == before and not leftovers(tmp_path)


def test_a_disk_that_fills_while_the_tensors_are_written(tmp_path, monkeypatch):
    """A real limit, not a mock: a file may not grow past 4 kB in this child."""
    import resource
    import signal

    path = tmp_path / "m.safetensors"
    save_model(path, {"a": torch.zeros(10)}, HEADER)
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save_model(path, {"a": torch.zeros(100_000)}, HEADER)
        except UserError as error:
            os._exit(7 if "could not be written" in error.message else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert path.read_bytes() == before and not leftovers(tmp_path)


def test_safetensors_own_library_reads_the_files(model_file):
    from safetensors import safe_open
    from safetensors.torch import load_file

    path, tensors = model_file
    read = load_file(path)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"


def test_no_permission_as_an_ordinary_user(tmp_path):
    if os.name != "posix":
        pytest.skip("POSIX permissions")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    os.chmod(tmp_path, 0o755)
    child = os.fork()
    if child == 0:  # as "nobody": root may write anywhere
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            save_model(locked / "m.safetensors", {"a": torch.zeros(1)}, HEADER)
        except UserError as error:
            os._exit(7 if "no permission to write" in error.message else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not os.listdir(locked)


def test_the_file_and_its_folders_are_synced_before_the_old_one_goes(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc")
    atomic_bytes(tmp_path / "new" / "deep" / "file", b"x")
    rename = events.index("rename")
    assert any(".file.tmp-" in name for name in events[:rename])
    after = set(events[rename:])
    assert str(tmp_path / "new" / "deep") in after
    # A new folder is an entry of its parent: without these the rename may not survive a power cut.
    assert {str(tmp_path / "new"), str(tmp_path)} <= set(events)


def test_windows_does_not_sync_folders(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(atomic.os, "open", lambda *a: opened.append(a))
    monkeypatch.setattr(atomic.os, "name", "nt")
    atomic.sync_folder(tmp_path)
    assert not opened
