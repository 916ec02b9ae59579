"""Each main protection taken out: the trials must notice. A fault test that cannot fail protects nothing."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from cmtool import checkpoint
from cmtool.errors import CheckpointError, UserError
from cmtool.files import atomic
from cmtool.training import lock, loop, optimizers, state
from tests.faults.commands import half_done
from tests.faults.harness import broken_files, fsync_fails, kill_at, trial
from tests.faults.test_damage import damage_one, newest_checkpoint
from tests.training.test_session import breaks
from tests.training.tiny import config_of, run, session_of


@contextlib.contextmanager
def written_in_place(path):
    """What `atomic_write` would be without its temporary file: the final name at once."""
    atomic.make_folder(Path(path).parent)
    with atomic.writing(Path(path)):
        yield Path(path)
        with open(path, "rb+") as stream:
            os.fsync(stream.fileno())


def killed_somewhere(known, place) -> list[str]:
    """Kill training before each change; return what the first kill with a trace left broken.

    Every third change first, from the one on that is the likeliest: the fourth, seventh, ... came out whole.
    """
    for number in (number for first in (5, 6, 4) for number in range(first, 60, 3)):
        folder = known["train"].folder(place / str(number))
        trial("mutant", known["train"].words, folder, arm=kill_at(number))
        if found := broken_files(folder):
            return found
    return []


def test_without_atomic_writes_a_kill_leaves_half_a_file(known, tmp_path, monkeypatch):
    def torn(path, tensors, header):
        """Write in place, in two halves, as any plain writer does."""
        plain(path, tensors, header)
        data = Path(path).read_bytes()
        with open(path, "wb") as stream:
            stream.write(data[: len(data) // 2])
            stream.flush()
            os.fsync(stream.fileno())
            stream.write(data[len(data) // 2 :])

    plain = checkpoint.save_model
    monkeypatch.setattr(checkpoint, "atomic_write", written_in_place)
    monkeypatch.setattr(state, "save_model", torn)
    assert killed_somewhere(known, tmp_path / "mutant")


def test_without_the_digest_a_flipped_bit_goes_unseen(known, tmp_path, monkeypatch):
    source = half_done(known["train"], tmp_path)
    name = newest_checkpoint(source)

    def trusting(path):
        return checkpoint.read_header(path), ""

    monkeypatch.setattr(checkpoint, "verify", trusting)
    unseen = 0
    for seed in range(12):
        try:
            unseen += "damaged" not in damage_one(known["train"], source, tmp_path / str(seed), name, seed).err
        except AssertionError:  # the run ends with other bytes
            unseen += 1
    assert unseen


def test_without_the_lock_two_processes_train_in_one_folder(tmp_path, monkeypatch):
    def second_gets_in() -> bool:
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException), lock.locked(tmp_path):
                time.sleep(20)
            os._exit(0)
        until = time.monotonic() + 10
        while not (tmp_path / "run.lock").exists() and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        try:
            with lock.locked(tmp_path):
                return True
        except UserError:
            return False
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)

    assert not second_gets_in()
    monkeypatch.setattr(lock, "_try_lock", lambda handle: True)
    assert second_gets_in()


def test_without_the_checks_nan_reaches_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizers.math, "isfinite", lambda value: True)
    monkeypatch.setattr(loop, "all_finite", lambda modules: True)
    monkeypatch.setattr("cmtool.training.report.Tally.finite", lambda self: True)
    session, _ = session_of(config_of("edm", "train.checkpoint_every=4", steps=9), tmp_path / "run")
    breaks(session, {2}, "always")
    with contextlib.suppress(UserError):
        run(session, checkpoint_free_stop())
    tensors, _ = checkpoint.load_tensors(session.folder.checkpoints()[0][1])
    assert any(bool(tensor.isnan().any()) for tensor in tensors.values() if tensor.is_floating_point())


def checkpoint_free_stop():
    """A stop that never asks to stop."""
    from cmtool.machine.stopping import Stop

    return Stop()


@pytest.mark.parametrize("lost", ["moments", "average", "step"])
def test_without_a_part_of_the_state_a_resumed_run_ends_elsewhere(known, tmp_path, monkeypatch, lost):
    plain = state.TrainState.restore

    def forgetful(self, path):
        start = {name: tensor.clone() for name, tensor in self.ema.network.state_dict().items()}
        plain(self, path)
        if lost == "moments":
            self.optimizer.state.clear()
        elif lost == "average":
            self.ema.network.load_state_dict(start)
        else:
            self.step -= 1

    folder = half_done(known["train"], tmp_path)
    monkeypatch.setattr(state.TrainState, "restore", forgetful)
    with pytest.raises(AssertionError, match="differs"):
        known["train"].assert_recovers(folder)


def test_without_falling_back_a_damaged_checkpoint_ends_the_run(known, tmp_path, monkeypatch):
    def newest_only(folder, training):
        step, file = folder.checkpoints()[0]
        training.restore(file)
        return step, {}

    source = half_done(known["train"], tmp_path)
    monkeypatch.setattr("cmtool.training.session.restore_newest", newest_only)
    with pytest.raises(AssertionError, match="must not stop the run"):
        damage_one(known["train"], source, tmp_path, newest_checkpoint(source), seed=100)


def test_without_minding_fsync_a_failing_disk_goes_unsaid(known, tmp_path, monkeypatch):
    def careless(path):
        return contextlib.suppress(OSError)

    folder = known["train"].folder(tmp_path / "good")
    assert trial("mutant", known["train"].words, folder, arm=fsync_fails(4)).code == 1
    monkeypatch.setattr(atomic, "writing", careless)
    folder = known["train"].folder(tmp_path / "mutant")
    assert "could not be written" not in trial("mutant", known["train"].words, folder, arm=fsync_fails(4)).err


def test_the_protections_are_what_the_mutants_replace():
    """Names that the mutations patch: a rename must not turn them into tests of nothing."""
    assert callable(atomic.atomic_write) and callable(checkpoint.verify) and callable(lock._try_lock)
    assert loop.all_finite is optimizers.all_finite and issubclass(CheckpointError, UserError)
