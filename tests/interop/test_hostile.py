"""Files that were made to do harm, or were cut: refused with one sentence, and nothing of theirs ever runs."""

import builtins
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch

from cmtool.errors import CheckpointError, UserError
from cmtool.interop import jax, pickles
from cmtool.interop.msgpack import Decoder
from cmtool.interop.reading import ImportOptions, import_model, read_foreign
from tests.interop import foreign


class Runs:
    """Pickles into a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def alarm(tmp_path):
    """A file that exists as soon as anything hostile has run."""
    path = tmp_path / "alarm"
    yield path
    assert not path.exists(), "code from the file ran"


def refuses(path, words):
    with pytest.raises(UserError, match=words) as caught:
        import_model(path, path.parent / "out.safetensors", ImportOptions())
    assert "\n" not in caught.value.message
    assert not (path.parent / "out.safetensors").exists()


@pytest.mark.parametrize("suffix", [".pkl", ".pt"])
def test_calls_of_the_system(tmp_path, alarm, suffix):
    for function, argument in (
        (os.system, f"touch {alarm}"),
        (builtins.eval, f"open({str(alarm)!r}, 'w')"),
        (builtins.exec, f"open({str(alarm)!r}, 'w')"),
    ):
        path = tmp_path / f"evil{suffix}"
        path.write_bytes(pickle.dumps({"ema": Runs(function, argument)}))
        refuses(path, "is refused: it names")


def test_a_torch_file_with_a_call(tmp_path, alarm):
    path = tmp_path / "evil.pt"
    torch.save({"time_embed.0.weight": torch.zeros(1), "x": Runs(os.system, f"touch {alarm}")}, path)
    refuses(path, "holds more than tensors, and loading that could run code")
    torch.save({"x": Runs(os.system, f"touch {alarm}")}, path, _use_new_zipfile_serialization=False)
    refuses(path, "holds more than tensors|no torch file")


def test_hostile_source_and_hostile_storage_inside_a_snapshot(tmp_path, alarm):
    source = f"open({str(alarm)!r}, 'w').close()"
    with foreign.nvlabs(), open(tmp_path / "source.pkl", "wb") as stream:
        network = foreign.module_tree(foreign.state("edm_ddpmpp"), "EDMPrecond")
        network.meta["module_src"] = source
        pickle.dump({"ema": network}, stream)
    assert read_foreign(tmp_path / "source.pkl", ImportOptions()).form == "edm"

    inner = io.BytesIO()
    torch.save(Runs(os.system, f"touch {alarm}"), inner, _use_new_zipfile_serialization=False)
    for payload in (inner.getvalue(), b"PK\x03\x04 zipped", b"", 5):
        storage = Runs(torch.storage._load_from_bytes, payload)
        view = Runs(torch._utils._rebuild_tensor_v2, storage, 0, (1,), (1,), False, {})
        with foreign.nvlabs(), open(tmp_path / "storage.pkl", "wb") as stream:
            pickle.dump({"ema": foreign.Persistent("EDMPrecond", {"_parameters": {"a": view}, "_modules": {}})}, stream)
        refuses(tmp_path / "storage.pkl", "storage of an unknown kind|damaged or hostile tensor")


@pytest.mark.parametrize(
    ("offset", "size", "stride"), [(0, (9,), (1,)), (8, (1,), (1,)), (0, (2, 2), (7, 1)), (-1, (1,), (1,)), (0, (2,), (-1,)), (0, (2,), (1, 1)), (0, ("a",), (1,))]
)  # fmt: skip
def test_views_outside_their_storage(tmp_path, offset, size, stride):
    inner = io.BytesIO()
    torch.save(torch.zeros(8).storage(), inner, _use_new_zipfile_serialization=False)
    storage = Runs(torch.storage._load_from_bytes, inner.getvalue())
    view = Runs(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
    with foreign.nvlabs(), open(tmp_path / "view.pkl", "wb") as stream:
        pickle.dump({"ema": foreign.Persistent("EDMPrecond", {"_parameters": {"a": view}})}, stream)
    refuses(tmp_path / "view.pkl", "reaches outside its storage|impossible shape")


def test_getattr_is_inert(tmp_path):
    """ECT's genuine files hold a bound method; the same words could fetch anything, so they fetch nothing."""
    with foreign.nvlabs(), open(tmp_path / "ect.pkl", "wb") as stream:
        network = foreign.module_tree(foreign.state("edm_ddpmpp"), "ECMPrecond")
        pickle.dump({"ema": network, "loss_fn": Runs(getattr, network, "state")}, stream)
    content = pickles.read_pickle(tmp_path / "ect.pkl")
    assert isinstance(content["loss_fn"], pickles.Inert)
    assert content["ema"].name == "ECMPrecond"


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "numpy.load",
        "subprocess.Popen",
        "torch_utils.persistence.exec",
    ],
)
def test_names_outside_the_list_are_refused(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04" + f"c{module}\n{attribute}\n.".encode())
    refuses(path, f"it names '{name}'")


def test_a_snapshot_without_a_network(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"ema": 3, "other": 1}))
    refuses(tmp_path / "x.pkl", "no network under 'ema' or 'net'; it holds: ema, other")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([1, 2]))
    refuses(tmp_path / "x.pkl", "holds a list, not a network snapshot")


def archive(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as stream:
        for name, data in members.items():
            stream.writestr(name, data)
    return path


def test_zips_that_climb_out_or_swell(tmp_path):
    refuses(
        archive(tmp_path / "a.pt", {"archive/data.pkl": b"x", "archive/../../evil": b"x"}), "points outside the archive"
    )
    refuses(archive(tmp_path / "b.pt", {"/etc/evil": b"x"}), "points outside the archive")
    bomb = archive(tmp_path / "c.pt", {"archive/data.pkl": bytes(10_000_000)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 20_000
    refuses(bomb, "is compressed, which torch never does")
    lying = archive(tmp_path / "d.pt", {"archive/data.pkl": b"x" * 50})
    lying.write_bytes(lying.read_bytes().replace(struct.pack("<I", 50), struct.pack("<I", 1 << 30)))
    refuses(lying, "claim more bytes than the file has|zip directory cannot be read")


def test_an_npz_of_objects_is_no_model_and_is_never_unpickled(tmp_path, alarm):
    np.savez(tmp_path / "x.npz", arr=np.array([Runs(os.system, f"touch {alarm}")], dtype=object))
    refuses(tmp_path / "x.npz", "no torch file, or is damaged")


@pytest.mark.parametrize("name", ["openai_imagenet64", "edm_ddpmpp", "jax_ncsnpp"])
@pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
def test_cut_downloads(tmp_path, name, share):
    path, _ = foreign.write(name, tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refuses(path, "download complete|damaged|no readable pickle")


def test_a_cut_safetensors_file_and_a_wrong_header(tmp_path):
    path, _ = foreign.write("diffusers_imagenet64", tmp_path)
    weights = path / "unet/diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    refuses(path, "is damaged")
    weights.write_bytes(struct.pack("<Q", 1 << 60) + data[8:])
    refuses(path, "is damaged")
    (path / "unet/config.json").write_text("{")
    refuses(path, "no readable JSON")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "list longer than itself"),
        (b"\x81\xa1a\xdf\xff\xff\xff\xff", "map longer than itself"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "ends too early"),
        (b"\x81\xa1a" + b"\x91" * 200 + b"\x01", "nests too deep"),
        (b"\x81\xa1a\xc1", "unknown code 0xc1"),
        (b"\x81\xa1a\xd4\x07\x00", "unknown extension 7"),
        (
            foreign.pack({"a": 1})[:-1] + b"\xc7\x0c\x01" + foreign.pack([[4], "object", b"abcd"]),
            "unknown type 'object'|ends too early|unknown form",
        ),
    ],
)
def test_hostile_msgpack(tmp_path, data, words):
    (tmp_path / "checkpoint_1").write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        jax.read(tmp_path / "checkpoint_1")


def test_arrays_whose_bytes_do_not_fill_their_shape():
    inner = foreign.pack([[3, 3], "float32", b"\x00" * 8])
    with pytest.raises(CheckpointError, match="do not fill its shape"):
        Decoder(b"\xc7" + bytes([len(inner)]) + b"\x01" + inner).document()
    inner = foreign.pack([[2], "bfloat16", struct.pack("<HH", 0x3F80, 0xC000)])
    assert Decoder(b"\xc7" + bytes([len(inner)]) + b"\x01" + inner).document().tolist() == [1.0, -2.0]


def test_arrays_in_chunks_are_joined():
    whole = np.arange(6, dtype=np.float32)
    chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}, "chunks": {"0": whole[:4], "1": whole[4:]}}
    assert np.array_equal(Decoder(foreign.pack(chunked)).document(), whole.reshape(2, 3))
