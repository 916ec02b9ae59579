"""`cmtool ema` and `--diagnose`, as they are typed."""

import json

SMALL = ("--set", "network.channels=8", "--set", "network.head_channels=8", "--set", "data.size=64", "--batch-size", 8,
         "--set", "eval.reference=")  # unjudged: no search for sampling times at the end  # fmt: skip


def test_an_average_of_another_width_after_training(cmtool, workdir):
    made = cmtool(
        "train-ct", "--steps", 12, "--out", "run", *SMALL, "--diagnose", "--set", "train.checkpoint_every=6",
        "--set", "train.snapshot_every=2", "--set", 'train.extra_emas=[{kind="power",std=0.05}]', "--recipe", "ict-gc",
    )  # fmt: skip
    assert made.code == 0, made.err
    assert "Discrepancy and transport cost at step 12" in made.out
    rows = [json.loads(line) for line in (workdir / "run" / "discrepancy.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [6, 12]
    assert len(list((workdir / "run" / "averages").iterdir())) == 12
    typed = cmtool("ema", "run", "--std", 0.07, "--json")
    document = json.loads(typed.out)
    assert document["snapshots"] == 12
    assert document["error"] < 0.1
    assert (workdir / "run" / "ema-0.07.safetensors").is_file()
    sampled = cmtool("sample", "--model", "run/ema-0.07.safetensors", "--num", 4, "--out", "grid.png")
    assert sampled.code == 0, sampled.err


def test_a_run_without_snapshots(cmtool, workdir):
    (workdir / "run").mkdir()
    typed = cmtool("ema", "run", "--std", 0.05)
    assert typed.code == 1
    assert "kept no snapshots" in typed.err
    assert "snapshot_every" in typed.err


def test_a_run_that_is_not_there(cmtool, workdir):
    typed = cmtool("ema", "nothere", "--std", 0.05)
    assert typed.code == 1
    assert typed.err == "Error: there is no run folder nothere.\nHint: cmtool runs lists the runs of a folder.\n"


def test_a_width_that_is_none(cmtool, workdir):
    typed = cmtool("ema", "run", "--std", 0.5)
    assert typed.code == 1
    assert "no width" in typed.err
