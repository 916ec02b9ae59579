"""References by name and path, the cache of features, and references of one's own."""

import json
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest

from cmtool.config.load import resolve
from cmtool.data import save_npz
from cmtool.data.load import load_dataset
from cmtool.errors import DataError, OfflineError
from cmtool.evaluation import pretrained
from cmtool.evaluation.choices import REFERENCES
from cmtool.evaluation.closing_search import OWN_COUNT, RunJudge
from cmtool.evaluation.features import build_features
from cmtool.evaluation.frechet import frechet_distance, frechet_to_fit
from cmtool.evaluation.judge import Judge
from cmtool.evaluation.make_reference import make_reference
from cmtool.evaluation.measure import measure, measure_reference
from cmtool.evaluation.references import NAMED, check_reference, resolve_reference
from cmtool.evaluation.samples import from_array
from cmtool.evaluation.statistics import statistics
from cmtool.files.cache import cache_dir
from tests.evaluation.stand_in import write_stand_in

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures(count=40, side=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def test_names():
    assert set(NAMED) == set(REFERENCES)
    with pytest.raises(DataError, match=r"unknown reference 'cifar'.*Did you mean cifar10"):
        check_reference("cifar")


@pytest.mark.parametrize("name", [name for name in REFERENCES if NAMED[name].remote])
def test_published_references_offline_are_one_clear_sentence(name):
    with pytest.raises(OfflineError) as caught:
        resolve_reference(name, (64, 64, 3))
    remote = NAMED[name].remote(NAMED[name].mode)
    assert remote.name in caught.value.message and str(remote.path) in caught.value.message
    assert remote.url in caught.value.hint and str(remote.path) in caught.value.hint


def test_the_two_imagenets_are_two_files():
    first, second = (NAMED[name].remote("legacy_tensorflow") for name in ("imagenet64", "imagenet64-edm"))
    assert first.path != second.path and first.url != second.url


def test_a_published_file_put_in_its_place_is_used_as_adm_uses_it(place):
    # Statistics stand for the whole data set, images are for precision and recall.
    random = np.random.default_rng(0)
    arrays = {"mu": random.standard_normal(2048), "sigma": np.eye(2048), "arr_0": pictures(20, 64)}
    remote = NAMED["imagenet64"].remote("legacy_tensorflow")
    remote.path.parent.mkdir(parents=True)
    np.savez(remote.path, **arrays)
    write_stand_in(cache_dir() / "features" / "inception-2015-12-05.pt")
    judge = Judge.of("imagenet64", (64, 64, 3), batch_size=10)
    assert np.array_equal(judge.side.fit.mean, arrays["mu"])
    found = judge(from_array(pictures(12, 64, seed=1), "fake"))
    assert found.values["fid"] == pytest.approx(frechet_to_fit(found.measured.features, judge.side.fit))
    assert found.values["sfid"] is None and found.values["precision"] is not None and found.values["is"] > 0
    with pytest.raises(
        DataError, match=r"statistics of inception \(legacy_tensorflow\) features, not of inception \(clean\)"
    ):
        measure_reference(judge.reference, build_features("inception", (64, 64, 3), "clean"), 10)


def test_statistics_alone_give_fid_and_refuse_precision(place):
    features = np.random.default_rng(0).standard_normal((50, 64))
    fit = statistics(features)
    np.savez("stats.npz", mu=fit.mean, sigma=fit.covariance)
    network = build_features("digits", (8, 8, 1))
    reference = resolve_reference("stats.npz")
    with pytest.raises(DataError, match="statistics of inception"):
        measure_reference(reference, network)
    save_npz("digits.npz", pictures(60, channels=1))
    made = make_reference(place / "ref.npz", Judge.of("digits.npz", features="digits"), "digits", kept=0)
    judge, samples = Judge.of(str(made), (8, 8, 1)), from_array(pictures(50, channels=1, seed=1), "fake")
    found = judge(samples)
    assert found.values["fid"] > 0 and found.values["precision"] is None
    with pytest.raises(DataError, match="holds statistics only"):
        judge(samples, ("pr",))


def test_statistics_alone_are_of_images_of_one_size(place):
    save_npz("digits.npz", pictures(60, channels=1))
    make_reference(place / "ref.npz", Judge.of("digits.npz", features="digits"), "digits", kept=0)
    assert resolve_reference("ref.npz").shape == (8, 8, 1)
    with pytest.raises(DataError, match="16 x 16 with 3 channels against a reference of 8 x 8 with 1 channel"):
        Judge.of("ref.npz", (16, 16, 3))
    # A published file says nothing of the size, and Inception takes all sizes.
    write_stand_in(cache_dir() / "features" / "inception-2015-12-05.pt")
    np.savez("stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    talk = MagicMock()
    Judge.of("stats.npz", (8, 8, 3), talk=talk)
    assert "8 x 8 as well cannot be checked" in talk.warn.call_args.args[0]
    remote = NAMED["cifar10"].remote("legacy_tensorflow")
    remote.path.parent.mkdir(parents=True)
    Path("stats.npz").rename(remote.path)
    with pytest.raises(DataError, match="64 x 64 with 3 channels against a reference of 32 x 32"):
        Judge.of("cifar10", (64, 64, 3))


@pytest.mark.parametrize("shape", [8, [8, 8], [8, 8, "1"], None])
def test_a_shape_that_is_none_is_refused(place, shape):
    np.savez("ref.npz", mu=np.zeros(4), sigma=np.eye(4), meta=np.array(json.dumps({"shape": shape})))
    with pytest.raises(DataError, match="no height, width, channels"):
        resolve_reference("ref.npz")


def test_a_reference_of_ones_own_equals_its_images(place):
    save_npz("real.npz", pictures(90, 16))
    real = Judge.of("real.npz", features="shapes")
    make_reference(place / "ref.npz", real, "shapes", kept=30)
    reference = resolve_reference("ref.npz")
    assert (reference.images.count, reference.features, reference.given.count) == (30, "shapes", 90)
    samples = from_array(pictures(80, 16, seed=2), "fake")
    direct, through = real(samples).values, Judge.of(reference)(samples).values
    assert through["fid"] == pytest.approx(direct["fid"], rel=1e-9)
    with pytest.raises(DataError, match="statistics of shapes features"):
        measure_reference(reference, build_features("digits", (8, 8, 1)))


def test_features_are_kept_by_content_and_a_damaged_cache_is_nothing(place):
    network, images = build_features("shapes", (16, 16, 3)), from_array(pictures(10, 16), "a")
    first = measure(images, network)
    files = list((cache_dir() / "features").iterdir())
    assert len(files) == 1
    asked = []
    spy = type(network)(network.name, network.fingerprint, lambda batch: asked.append(1), network.accepts)
    again = measure(from_array(pictures(10, 16), "the same pixels under another name"), spy)
    assert not asked and np.array_equal(again.features, first.features)
    files[0].write_bytes(b"broken")
    assert np.array_equal(measure(images, network).features, first.features)
    measure(images, build_features("shapes", (16, 16, 3)), use_cache=False)


def test_builtin_references():
    digits = resolve_reference("digits", (8, 8, 1))
    assert (digits.images.count, digits.features, digits.count) == (1797, "digits", 1797)
    assert resolve_reference("shapes", (16, 16, 3)).images.shape == (16, 16, 3)
    toy = resolve_reference("toy2d", (2, 1, 1))
    assert toy.images.points and toy.features == "points"
    network = build_features("points", (2, 1, 1))
    side = measure_reference(toy, network)
    assert frechet_distance(side.fit, side.fit) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(3)}, "no array 'sigma'"),
        ({"mu": np.zeros(3), "sigma": np.zeros((4, 4))}, "do not fit together"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
        ({"mu": np.array([None] * 3, dtype=object), "sigma": np.eye(3)}, "holds Python objects"),
        ({"a": np.zeros(3)}, "has no images: its arrays are a"),
    ],
)
def test_reference_files_that_are_none(arrays, words):
    np.savez("bad.npz", **arrays)
    with pytest.raises(DataError, match=words):
        resolve_reference("bad.npz")


def test_a_damaged_reference_file(place):
    (place / "bad.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match="damaged"):
        resolve_reference("bad.npz")


def test_figures_by_request_and_notes():
    judge = Judge.of("digits", (8, 8, 1))
    images = judge.reference.images
    found = judge(images.first(40), ("fid", "is", "classes"))
    assert found.values["kid"] is None and found.values["precision"] is None
    assert "40 samples for 64 features" in found.notes[0]
    assert found.values["class_agreement"] > 0.97 and set(found.per_class) == set("0123456789")
    assert "biased upward" in judge(images, ("fid",)).notes[0]
    with pytest.raises(DataError, match="sfid"):
        judge(images.first(40), ("sfid",))
    with pytest.raises(DataError, match="more than 5 images"):
        judge(images.first(4), ("pr",))
    few = judge(images.first(4))
    assert few.values["precision"] is None and any("more than 5" in note for note in few.notes)


@pytest.mark.parametrize("preset", ["digits", "avatars", "shapes", "shapes64", "toy2d"])
def test_presets_of_built_in_data_are_judged_by_features_that_come_along(preset, monkeypatch):
    monkeypatch.setattr(pretrained, "has_imagenet", lambda: False)
    config = resolve(preset).config
    side = config.data.resolution
    shape = (2, 1, 1) if preset == "toy2d" else (side, side, config.data.channels)
    reference = resolve_reference(config.eval.reference, shape)
    assert reference.features == {"toy2d": "points", "avatars": "small"}.get(preset, config.data.source)
    network = build_features(reference.features, shape)
    assert network.domain or network.name in ("points", "small")
    if preset == "avatars":
        assert "knows drawn shapes" in network.caveat and reference.images.count == 2000
        monkeypatch.setattr(pretrained, "has_imagenet", lambda: True)
        assert resolve_reference("avatars", shape).features == "imagenet"
        # Faces that runs train on stand beside them, to judge copying by.
        trained = {face.tobytes() for face in load_dataset(config.data).images.permute(0, 2, 3, 1).contiguous().numpy()}
        assert reference.training.count == 2000 and all(face.tobytes() in trained for face in reference.training.all())
        assert not any(face.tobytes() in trained for face in reference.images.all())


def test_a_run_on_avatars_looks_at_them_when_it_is_asked(monkeypatch):
    """With features that take their time the reference is not looked at before training, and the search is short."""
    monkeypatch.setattr(pretrained, "has_imagenet", lambda: True)
    header = {"kind": "consistency", "data": {"resolution": 16, "channels": 3}, "times": {}}
    model = type("Model", (), {"header": header, "device": "cpu"})()
    judge = RunJudge.of(resolve("avatars").config.eval, model)
    assert judge.slow and not judge.own and "judge" not in judge.__dict__
    assert judge.search_count(1000) == 0 and judge.search_count(10**6) == OWN_COUNT
