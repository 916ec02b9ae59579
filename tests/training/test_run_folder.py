"""Run folders: what may run where, metrics that survive a kill, and the lock."""

from __future__ import annotations

import json
import os
import signal
import socket
import time

import pytest

from cmtool.config.load import from_toml
from cmtool.errors import CheckpointError, UserError
from cmtool.training import lock as locks
from cmtool.training.lock import check_free, locked
from cmtool.training.run_folder import check_run, open_run
from tests.training.tiny import config_of


def test_a_new_folder_keeps_its_configuration(tmp_path):
    config = config_of("ict")
    folder = open_run(tmp_path / "runs" / "a b ü", config)
    assert from_toml(folder.path / "config.toml") == config
    assert open_run(folder.path, config).path == folder.path


def test_checking_writes_nothing(tmp_path):
    check_run(tmp_path / "no" / "where", config_of("ict"))
    assert not os.listdir(tmp_path)


def test_another_configuration_is_refused_with_the_keys_named(tmp_path):
    open_run(tmp_path / "run", config_of("ict"))
    other = config_of("ict", "train.lr=0.003", "recipe.curriculum.s1=40", steps=7)
    with pytest.raises(UserError) as error:
        check_run(tmp_path / "run", other)
    for part in ("train.steps: 6 there, 7 here", "train.lr: ", "recipe.curriculum.s1: ", "another configuration"):
        assert part in error.value.message
    assert "--fresh" in error.value.hint


@pytest.mark.parametrize(
    "change",
    [
        "train.log_every=3",
        "train.checkpoint_every=2",
        "train.threads=1",
        "train.micro_batch=2",
        "train.bad_step=rollback",
    ],
)
def test_rhythm_and_machine_are_not_part_of_the_same(tmp_path, change):
    open_run(tmp_path / "run", config_of("ict"))
    check_run(tmp_path / "run", config_of("ict", change))


def test_a_precision_left_to_the_machine_fits_any(tmp_path):
    open_run(tmp_path / "run", config_of("ict"))
    check_run(tmp_path / "run", config_of("ict", "train.precision=fp32"))
    open_run(tmp_path / "other", config_of("ict", "train.precision=fp64"))
    with pytest.raises(UserError, match="precision: fp64 there, fp32 here"):
        check_run(tmp_path / "other", config_of("ict", "train.precision=fp32"))


def test_folders_that_hold_something_else(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a run folder"):
        check_run(tmp_path / "file", config_of("ict"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    with pytest.raises(UserError, match="not empty and holds no run"):
        check_run(tmp_path / "photos", config_of("ict"))
    (tmp_path / "empty").mkdir()
    check_run(tmp_path / "empty", config_of("ict"))


def test_a_damaged_configuration_is_named(tmp_path):
    folder = open_run(tmp_path / "run", config_of("ict"))
    text = (folder.path / "config.toml").read_text()
    (folder.path / "config.toml").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match=r"config\.toml is damaged"):
        check_run(folder.path, config_of("ict"))


def test_fresh_removes_what_a_run_writes_and_nothing_else(tmp_path):
    folder = open_run(tmp_path / "run", config_of("ict"))
    for name in ("model.safetensors", "best.safetensors", "ema-0.safetensors", "metrics.jsonl", "run.log", "mine.txt"):
        (folder.path / name).write_text("x")
    folder.checkpoint(3).parent.mkdir(parents=True)
    folder.samples.mkdir()
    (tmp_path / "run" / "mine").mkdir()
    open_run(folder.path, config_of("edm"), fresh=True)
    assert sorted(os.listdir(folder.path)) == ["config.toml", "mine", "mine.txt"]
    assert from_toml(folder.path / "config.toml").recipe_name == "edm"


def test_metrics_survive_a_line_cut_by_a_kill(tmp_path):
    folder = open_run(tmp_path / "run", config_of("ict"))
    for step in (2, 4, 6):
        folder.append({"step": step})
    with open(folder.metrics, "a") as stream:
        stream.write('{"step": 8, "lo')
    assert [row["step"] for row in folder.rows()] == [2, 4, 6]
    folder.forget_after(4)
    assert folder.metrics.read_text() == '{"step": 2}\n{"step": 4}\n'


def test_sweeping_removes_temporary_files_alone(tmp_path):
    folder = open_run(tmp_path / "run", config_of("ict"))
    place = folder.checkpoint(3).parent
    place.mkdir(parents=True)
    folder.samples.mkdir()
    litter = [
        place / ".state.tmp-12-ab.safetensors",
        folder.samples / ".step.tmp-1-c.png",
        folder.path / ".model.tmp-9-0.safetensors",
    ]
    for file in (*litter, place / "state.safetensors", folder.path / ".hidden"):
        file.write_text("x")
    open_run(tmp_path / "run", config_of("ict"))
    assert not any(file.exists() for file in litter)
    assert (place / "state.safetensors").exists() and (folder.path / ".hidden").exists()


def test_folders_that_are_no_checkpoints_are_passed_over(tmp_path):
    folder = open_run(tmp_path / "run", config_of("ict"))
    for name in ("step-x", "step-0000003", "other"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    folder.checkpoint(5).parent.mkdir()
    folder.checkpoint(5).write_text("")
    assert folder.checkpoints() == [(5, folder.checkpoint(5))]


def in_child(body):
    """Run `body` in a forked process; return its pid once it says it is ready, and what releases it."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            body(lambda: os.write(tell, b"x"))
        finally:
            os._exit(0)
    assert os.read(ready, 1) == b"x"
    return pid


def hold(folder):
    def body(ready):
        with locked(folder):
            ready()
            time.sleep(60)

    return in_child(body)


def test_a_second_process_is_refused_with_pid_and_host(tmp_path):
    run = tmp_path / "run"
    pid = hold(run)
    try:
        for attempt in (lambda: check_free(run), lambda: locked(run).__enter__()):
            with pytest.raises(UserError) as error:
                attempt()
            assert f"pid {pid} on {socket.gethostname()}" in error.value.message
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    # The holder died without a word: its lock is recognized as stale at once.
    check_free(run)
    with locked(run) as left:
        assert left.pid == pid and json.loads((run / "run.lock").read_text())["pid"] == os.getpid()
    assert not (run / "run.lock").exists()


def test_a_lock_left_by_a_process_whose_number_lives_on_is_stale(tmp_path):
    """After a restart of the machine any pid may belong to somebody: the lock itself decides, not the number."""
    (tmp_path / "run.lock").write_text(json.dumps({"pid": os.getppid(), "host": socket.gethostname()}))
    with locked(tmp_path) as left:
        assert left.pid == os.getppid()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x", "host": 1}', "\x00" * 50])
def test_a_lock_file_of_nonsense_is_stale(tmp_path, text):
    (tmp_path / "run.lock").write_text(text)
    check_free(tmp_path)
    with locked(tmp_path) as left:
        assert left is None


def test_on_windows_nobody_is_asked_whether_he_lives(monkeypatch):
    """There `os.kill(pid, 0)` is a Ctrl-C."""
    monkeypatch.setattr(locks.sys, "platform", "win32")
    monkeypatch.setattr(locks.os, "kill", lambda pid, number: pytest.fail("a signal was sent"))
    assert locks.Holder(2**22 + 12345, socket.gethostname()).alive


def test_where_the_file_system_knows_no_locks_the_pid_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_try_lock", lambda handle: None)
    alive = {"pid": os.getppid(), "host": socket.gethostname()}
    for said, refused in (
        (alive, True),
        (alive | {"host": "elsewhere"}, True),
        (alive | {"pid": 2**22 + 12345}, False),
    ):
        (tmp_path / "run.lock").write_text(json.dumps(said))
        if refused:
            with pytest.raises(UserError, match=f"pid {said['pid']} on {said['host']}"):
                locked(tmp_path).__enter__()
            with pytest.raises(UserError):
                check_free(tmp_path)
        else:
            check_free(tmp_path)
            with locked(tmp_path):
                pass


def test_many_processes_never_hold_the_lock_together(tmp_path):
    """Eight processes fight for half a second; each that gets in looks whether another one is inside."""
    pids = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            status, until = 0, time.monotonic() + 0.5
            while time.monotonic() < until:
                try:
                    with locked(tmp_path):
                        try:
                            os.close(os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL))
                        except FileExistsError:
                            status = 3
                        time.sleep(0.001)
                        os.unlink(tmp_path / "inside")
                except UserError:
                    continue
                except BaseException:
                    status = 4
            os._exit(status)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 8


def test_no_permission_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(locks.os, "open", refuse)
    with pytest.raises(UserError, match="no permission to write"):
        locked(tmp_path).__enter__()
