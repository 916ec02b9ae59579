"""`cmtool eval` and `cmtool search-times` as they are typed."""

import json

import numpy as np
import pytest
import torch

from cmtool.checkpoint import read_header
from cmtool.config.load import resolve, to_toml
from cmtool.config.schema import DataConfig
from cmtool.data import load_dataset, save_folder, save_npz
from cmtool.evaluation.inception import WEIGHTS
from cmtool.evaluation.metrics import KEYS
from cmtool.files.atomic import atomic_text
from tests.cli.tiny import Shell, write_model
from tests.evaluation.stand_in import write_stand_in

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")


@pytest.fixture
def shell(workdir, capfd):
    return Shell(workdir, capfd)


def digits(count=None, noise=0.0, seed=0):
    """Real digits as uint8 (N, 8, 8, 1), with noise if asked."""
    images = (
        load_dataset(DataConfig(source="digits", resolution=8, channels=1)).images.permute(0, 2, 3, 1).numpy()[:count]
    )
    moved = images + noise * 127.5 * np.random.default_rng(seed).standard_normal(images.shape)
    return moved.clip(0, 255).round().astype(np.uint8)


def write_digits_model(folder, name="tiny", **more):
    path = write_model(folder, name, channels=1, source="digits", **more)
    atomic_text(path.parent / "config.toml", to_toml(resolve("digits").config))
    return path


def test_one_file_as_a_document(shell, workdir):
    save_npz("a.npz", digits(600, 0.3))
    document = shell.json("eval", "a.npz", "--ref", "digits")
    said, (row,) = document["protocol"], document["results"]
    assert (said["reference"], said["reference_count"], said["features"]) == ("digits", 1797, "digits")
    assert len(said["reference_fingerprint"]) == 32 and said["domain_features"] is True
    assert said["precision_recall_k"] == 3 and len(said["weights_sha256"]) == 64
    metrics = row["metrics"]
    assert set(KEYS) <= set(metrics)
    assert (row["samples"], row["count"]) == ("a.npz", 600)
    assert 15 < metrics["fid"] < 40 and metrics["kid"] > 0 and metrics["is"] > 8
    assert 0.7 < metrics["precision"] < 0.95 and metrics["sfid"] is None


def test_real_digits_score_perfectly_and_noise_does_not(shell):
    save_npz("real.npz", digits())
    save_npz("noisy.npz", digits(noise=1.0))
    real, noisy = shell.json(
        "eval", "real.npz", "noisy.npz", "--ref", "digits", "--bootstrap", "0", "--metrics", "fid,pr"
    )["results"]
    assert abs(real["metrics"]["fid"]) < 1e-6
    assert (real["metrics"]["precision"], real["metrics"]["recall"]) == (1, 1)
    assert noisy["metrics"]["fid"] > 100 and noisy["metrics"]["precision"] < 0.6


def test_num_of_class_folders_is_spread_over_the_classes_and_skips_are_said(shell, workdir):
    data = load_dataset(DataConfig(source="digits", resolution=8, channels=1, labels=True))
    for digit in range(10):
        rows = data.images[data.labels == digit][:40].permute(0, 2, 3, 1).numpy()
        save_folder(rows, f"set/{digit}")
    (workdir / "set" / "3" / "torn.png").write_bytes(b"no image")
    (workdir / "set" / "7" / "gone.png").symlink_to("nowhere")
    (workdir / "set" / "__MACOSX").mkdir()
    document = shell.json("eval", "set", "--ref", "digits", "--num", "100", "--metrics", "fid")
    [row] = document["results"]
    skipped = "skipped 2 of 402 files: 1 a broken link, 1 unreadable"
    assert row["count"] == 100
    assert row["notes"][:2] == [skipped, "100 of 400 images, spread evenly over its 10 classes"]
    first = shell.json("eval", "set/0", "--ref", "digits", "--metrics", "fid")["results"][0]["metrics"]["fid"]
    assert row["metrics"]["fid"] < first / 4  # zeros alone lie far from all digits
    _, _, said = shell("eval", "set", "--ref", "digits", "--num", "100", "--metrics", "fid")
    assert f"set: {skipped}" in said and "set: 100 of 400 images, spread evenly over its 10 classes" in said


def test_several_sets_make_one_table_and_a_comparison(shell):
    save_npz("a.npz", digits(500, 0.1))
    save_folder(digits(500, 0.5), "b")
    code, out, err = shell("eval", "a.npz", "b/", "--ref", "digits", "--metrics", "fid,pr,kid", "--bootstrap", "30")
    assert code == 0
    for word in ("a.npz", "FD (digits)", "KD (digits)", "precision", "recall", "unpaired bootstrap", "differ"):
        assert word in out
    assert "density" not in out and "IS" not in out
    assert "no FID" in err and "biased upward" in err
    document = shell.json("eval", "a.npz", "a.npz", "--ref", "digits", "--metrics", "fid", "--bootstrap", "30")
    assert document["comparisons"][0]["distinguishable"] is False
    assert document["results"][0]["intervals"]["fid"][0] < document["results"][0]["metrics"]["fid"]


def test_a_model_is_sampled_once_and_its_row_is_kept(shell, workdir):
    path = write_digits_model(workdir)
    first = shell.json("eval", "--ref", "digits", "--num", 150)
    row = first["results"][0]
    assert (row["count"], row["nfe"], row["seeds"]) == (150, 1, "0-149")
    files = list((workdir / "samples").glob("*.npz"))
    assert [file.name for file in files] == ["tiny-1-0-150.npz"]
    made = files[0].stat().st_mtime_ns
    code, _, err = shell("eval", "--ref", "digits", "--num", 150)
    assert code == 0 and "samples in samples/tiny-1-0-150.npz" in err
    assert files[0].stat().st_mtime_ns == made
    rows = [json.loads(line) for line in (path.parent / "evaluations.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0]["metrics"] == row["metrics"] == rows[1]["metrics"]
    assert rows[0]["protocol"]["reference"] == "digits" and rows[0]["created"].endswith("Z")
    two = shell.json("eval", "--ref", "digits", "--num", 150, "--steps", 2)["results"][0]
    assert two["nfe"] == 2 and two["times"][0] == 80


def test_the_samples_made_last_are_judged(shell, workdir):
    write_digits_model(workdir)
    shell.out("sample", "--num", 120, "--times", "80,1.5", "--seed", 3, "--out", "samples/mine.npz")
    row = shell.json("eval", "--ref", "digits", "--num", 100)["results"][0]
    assert (row["times"], row["count"]) == ([80, 1.5], 100)
    other = shell.json("eval", "--ref", "digits", "--num", 130)["results"][0]
    assert other["times"] == [80]
    for times in ("80,1", "80,2"):
        row = shell.json("eval", "--ref", "digits", "--num", 40, "--times", times, "--metrics", "fid")["results"][0]
        assert row["times"] == [float(word) for word in times.split(",")]


def test_a_files_row_goes_to_the_model_that_it_names(shell, workdir):
    path = write_digits_model(workdir)
    shell.out("sample", "--num", 60, "--out", "mine.npz")
    shell.out("eval", "mine.npz", "--ref", "digits", "--metrics", "fid")
    assert len((path.parent / "evaluations.jsonl").read_text().splitlines()) == 1


def test_the_model_taken_is_the_newest_that_knows_the_references_data(shell, workdir):
    write_digits_model(workdir, "older")
    write_model(workdir, "newer")
    row = shell.json("eval", "--ref", "digits", "--num", 20, "--metrics", "fid")["results"][0]
    assert row["model"] == "runs/older/model.safetensors"


def test_a_table_over_evaluations_with_its_plot(shell, workdir):
    write_digits_model(workdir)
    document = shell.json("eval", "--ref", "digits", "--num", 100, "--steps", "1,2,4,8", "--metrics", "fid,pr")
    assert [row["nfe"] for row in document["results"]] == [1, 2, 4, 8]
    assert (workdir / document["plot"]).read_bytes().startswith(b"\x89PNG")
    assert all(one["paired"] for one in document["comparisons"])


def test_two_models_on_the_same_seeds(shell, workdir):
    write_digits_model(workdir, "one")
    write_digits_model(workdir, "two")
    document = shell.json("eval", "runs/one", "runs/two", "--ref", "digits", "--num", 80, "--metrics", "fid")
    assert [row["seeds"] for row in document["results"]] == ["0-79", "0-79"]
    assert document["comparisons"][0]["paired"] is True
    same = shell.json("eval", "runs/one", "runs/one", "--ref", "digits", "--num", 80, "--metrics", "fid")
    assert same["comparisons"][0]["distinguishable"] is False and same["comparisons"][0]["difference"] == 0


def test_labeled_models_are_judged_by_class(shell, workdir):
    write_digits_model(workdir, num_classes=10, names=[str(i) for i in range(10)])
    row = shell.json("eval", "--ref", "digits", "--num", 100, "--metrics", "classes")["results"][0]
    assert 0 <= row["metrics"]["class_agreement"] < 0.6
    assert set(row["per_class"]) <= set("0123456789")


def test_memorization_shows_the_closest_pairs(shell, workdir):
    save_npz("copied.npz", digits(200, 0.02))
    row = shell.json("eval", "copied.npz", "--ref", "digits", "--metrics", "memorization")["results"][0]
    assert row["metrics"]["copies_pixels"] > 0.95 and row["metrics"]["nearest_ratio"] < 0.2
    assert (workdir / row["closest"]).exists()


def test_consistency_along_a_teacher(shell, workdir):
    write_digits_model(workdir, "student")
    write_digits_model(workdir, "teacher", kind="diffusion")
    words = ("eval", "--ref", "digits", "--num", 40, "--metrics", "consistency", "--model", "runs/student")
    row = shell.json(*words, "--teacher", "runs/teacher")["results"][0]
    assert row["metrics"]["consistency_neighbor"] < row["metrics"]["consistency_far"]
    assert {"consistency_end", "consistency_shuffled"} <= set(row["metrics"])
    assert "no teacher" not in shell.fails(*words, "--teacher", "runs/student")
    save_npz("a.npz", digits(50))
    assert "asks a consistency model" in shell.fails("eval", "a.npz", "--ref", "digits", "--metrics", "consistency")


def test_points_are_judged_by_their_coordinates(shell, workdir):
    write_model(workdir, "toy", source="toy2d")
    row = shell.json("eval", "--ref", "toy2d", "--num", 300)["results"][0]
    assert row["metrics"]["fid"] > 0 and row["metrics"]["is"] is None


def test_a_reference_of_ones_own(shell, workdir):
    save_folder(digits(400), "photos")
    made = shell.out("eval", "--make-ref", "ref.npz", "--data", "photos", "--features", "digits")
    assert made == "ref.npz"
    save_npz("a.npz", digits(300, 0.1))
    through, direct = (
        shell.json("eval", "a.npz", "--ref", ref, "--features", "digits")["results"][0]["metrics"]
        for ref in ("ref.npz", "photos")
    )
    assert through["fid"] == pytest.approx(direct["fid"], rel=1e-9)
    assert through["precision"] == direct["precision"]
    assert shell.json("eval", "a.npz", "--ref", "ref.npz")["protocol"]["features"] == "digits"


def test_inception_from_its_place_and_the_sentence_without_it(shell, workdir):
    save_npz("a.npz", digits(12))
    save_npz("b.npz", digits(10, 0.2))
    err = shell.fails("eval", "a.npz", "--ref", "b.npz", "--features", "inception")
    for word in ("inception-2015-12-05.pt", str(WEIGHTS.path), WEIGHTS.url, "put it at"):
        assert word in err
    write_stand_in(WEIGHTS.path)
    code, out, err = shell("eval", "a.npz", "--ref", "b.npz", "--metrics", "fid,is", "--out", "result.json")
    assert code == 0
    assert "FID" in out and "IS" in out and "inception" in out and "not the published file" in err
    assert "12 samples for 2,048 features" in err
    document = json.loads((workdir / "result.json").read_text())
    assert document["protocol"]["resize"] == "legacy_tensorflow"
    clean = shell.json("eval", "a.npz", "--ref", "b.npz", "--mode", "clean", "--metrics", "fid")
    assert clean["protocol"]["features"] == "inception (clean)"
    assert clean["results"][0]["metrics"]["fid"] != document["results"][0]["metrics"]["fid"]


def test_a_users_features(shell, workdir):
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().mean((2, 3))

    torch.jit.script(Mean()).save("mine.pt")
    save_npz("a.npz", digits(100, 0.1))
    document = shell.json("eval", "a.npz", "--ref", "digits", "--features", "mine.pt", "--metrics", "fid")
    assert document["protocol"]["features"] == "mine.pt"


@pytest.mark.parametrize("name", ["imagenet64", "imagenet64-edm", "cifar10", "lsun_cat256", "lsun_bedroom256"])
def test_published_references_offline(shell, name):
    err = shell.fails("eval", "--ref", name)
    assert "CMTOOL_OFFLINE" in err and "put it at" in err and "https://" in err


def test_search_writes_times_that_sampling_uses(shell, workdir):
    path = write_digits_model(workdir, times={"2": [80.0, 5.0]})
    before = read_header(path)
    words = ("search-times", "--ref", "digits", "--steps", 2, "--num", 60, "--grid", 10)
    found = shell.json(*words)
    assert found["times"][0] == 80 and len(found["times"]) == 2 and found["features"] == "digits"
    tried = [tuple(one["times"]) for one in found["evaluations"]]
    assert len(tried) == len(set(tried)) and (80.0, 5.0) in tried
    assert min(found["candidates"].values()) == found["value"]
    assert (workdir / found["plot"]).exists()
    assert read_header(path) == before
    code, out, err = shell(*words, "--write", "--greedy")
    assert code == 0 and "written into" in err
    header = read_header(path)
    times = [float(word) for word in out.split()[-1].split(",")]
    assert header["times"]["2"] == pytest.approx(times, rel=1e-4)
    assert {**header, "times": 0} == {**before, "times": 0}
    _, _, said = shell("sample", "--steps", 2, "--num", 4)
    assert f"{times[1]:.4g}" in said and "the model's own times" in said


def bad(name):
    """Make what a bad command line names; returns the words."""
    save_npz("ok.npz", digits(50))
    if name == "rgb":
        save_npz("rgb.npz", digits(20).repeat(3, axis=-1))
    elif name == "large":
        save_npz("large.npz", np.zeros((20, 16, 16, 1), np.uint8))
    elif name == "objects":
        np.savez("objects.npz", arr_0=np.array([{}], dtype=object))
    elif name == "few":
        save_npz("few.npz", digits(3))
    elif name == "stats":
        np.savez("stats.npz", mu=np.zeros(64), sigma=np.eye(64))
    elif name == "floats":
        np.savez("floats.npz", arr_0=digits(20).astype(np.float32))
    elif name == "cut":
        save_npz("cut.npz", digits(300))
        with open("cut.npz", "rb+") as stream:
            stream.truncate(5000)
    return BAD[name][0].split()


BAD = {
    "unknown reference": ("eval ok.npz --ref digit", "Did you mean digits"),
    "no reference": ("eval ok.npz", "--ref is missing"),
    "unknown metric": ("eval ok.npz --ref digits --metrics fdi", "Did you mean fid"),
    "unknown features": ("eval ok.npz --ref digits --features vgg", "unknown feature network"),
    "missing features": ("eval ok.npz --ref digits --features no.pt", "no features at no.pt"),
    "unknown mode": ("eval ok.npz --ref digits --mode bicubic", "resizing mode"),
    "missing samples": ("eval none.npz --ref digits", "no samples at none.npz"),
    "no model": ("eval --ref digits", "there is no model"),
    "steps that are none": ("eval ok.npz --ref digits --steps two", "--steps"),
    "two ways of times": ("eval --ref digits --steps 2 --times 80,1", "give one of them"),
    "more than there are": ("eval ok.npz --ref digits --num 60", "holds 50 images; 60"),
    "rgb": ("eval rgb.npz --ref digits", "3 channels"),
    "large": ("eval large.npz --ref digits --features digits", "16 x 16"),
    "objects": ("eval objects.npz --ref digits", "never loaded"),
    "few": ("eval few.npz --ref digits --metrics pr", "more than 5 images"),
    "stats": ("eval ok.npz --ref stats.npz --features digits", "statistics of inception"),
    "floats": ("eval floats.npz --ref digits", "[-1, 1]"),
    "cut": ("eval cut.npz --ref digits", "damaged"),
    "too few resamples": ("eval ok.npz --ref digits --bootstrap 5", "too few"),
    "a reference without data": ("eval --make-ref ref.npz", "--data"),
    "is without classes": ("eval ok.npz --ref toy2d", "8 x 8"),
    "one step to search": ("search-times --ref digits --steps 1", "--steps"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(shell, workdir, name):
    err = shell.fails(*bad(name))
    assert BAD[name][1] in err
    assert not list(workdir.glob("**/.*tmp*"))


def test_argument_mistakes_do_not_import_torch(cmtool_process, workdir):
    done = cmtool_process("eval", "--ref", "digit", PYTHONPROFILEIMPORTTIME="1")
    assert done.code == 1 and "Did you mean digits" in done.err
    assert " torch\n" not in done.err and " numpy\n" not in done.err


def test_a_set_against_itself_is_at_zero_in_table_document_and_interval(shell, workdir):
    save_npz("a.npz", digits(300))
    save_npz("again.npz", digits(300)[::-1].copy())
    words = ("eval", "a.npz", "again.npz", "--ref", "a.npz", "--features", "digits", "--bootstrap", 20)
    document = shell.json(*words, "--metrics", "fid,kid")
    for row in document["results"]:
        assert (row["metrics"]["fid"], row["metrics"]["kid"], row["metrics"]["kid_std"]) == (0, 0, None)
        assert row["intervals"]["fid"][0] == 0 < row["intervals"]["fid"][1]
    assert "-0.0" not in json.dumps(document["results"])
    out = shell.out(*words[:2], *words[3:7], "--metrics", "fid,kid")
    values = [line.split()[-1] for line in out.splitlines() if "FD (digits)" in line or "KD (digits)" in line]
    assert values == ["0", "0"]


def test_a_kernel_distance_of_few_images_has_no_error_and_says_so(shell, workdir):
    save_npz("a.npz", digits(300, 0.2))
    code, out, err = shell("eval", "a.npz", "--ref", "digits", "--metrics", "kid")
    assert code == 0 and "±" not in out and "is given without an error" in " ".join(err.split())
    metrics = shell.json("eval", "a.npz", "--ref", "digits", "--metrics", "kid")["results"][0]["metrics"]
    assert metrics["kid"] > 0 and metrics["kid_std"] is None


def test_a_guided_teacher_is_judged_by_guided_samples(shell, workdir):
    """They are made and named as such, found again, and not taken for plain ones, nor these for them."""
    more = {"kind": "diffusion", "num_classes": 10, "label_dropout": 0.1}
    write_digits_model(workdir, "weak", **{**more, "label_dropout": 0.0})
    write_digits_model(workdir, "teacher", **more)
    ask = ("eval", "--model", "runs/teacher", "--ref", "digits", "--num", 60, "--steps", 2, "--metrics", "fid")
    values = {}
    for name, options in {
        "plain": (),
        "guided": ("--guidance", 2),
        "weak": ("--guidance", 2, "--weak", "runs/weak", "--guidance-interval", "0.001,5"),
        "guided again": ("--guidance", 2),
    }.items():
        (row,) = shell.json(*ask, *options)["results"]
        values[name] = row["metrics"]["fid"]
        assert row.get("guidance") == (2.0 if options else None)
    assert values["guided"] == values.pop("guided again")
    assert len({round(value, 3) for value in values.values()}) == 3
    made = sorted(path.name for path in (workdir / "samples").glob("*.npz"))
    assert made == [f"teacher-{kind}-0-60.npz" for kind in ("3", "6-g2", "6-g2-0.001-5-weak")]
    assert (row["samples"], row["nfe"]) == ("teacher, 6 NFE, guidance 2", 6)
    assert row.get("weak") is None


def test_guidance_that_cannot_be_is_refused_by_eval_too(shell, workdir):
    write_digits_model(workdir, "student")
    ask = ("eval", "--model", "runs/student", "--ref", "digits")
    assert "guided while it is trained" in shell.fails(*ask, "--guidance", 2)
    assert "there is none" in shell.fails(*ask, "--weak", "runs/student")
    assert not (workdir / "samples").exists()
