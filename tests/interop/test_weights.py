"""Which weights are taken of a checkpoint that holds several, in every form that training code writes them."""

import argparse
import copy
import itertools
import json
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from cmtool import models
from cmtool.checkpoint import read_header
from cmtool.config.networks import network_config
from cmtool.errors import CheckpointError, UserError
from cmtool.interop.reading import ImportOptions, import_model, read_foreign
from cmtool.interop.weights import reach_of, says_average
from cmtool.networks import build_network
from tests.interop import foreign
from tests.networks.network_helpers import redraw

TABLE = network_config(kind="adm", channels=16, channel_mult=(1,), num_blocks=1, attention=(), head_channels=32)
GIVEN = {"resolution": 16, "head_channels": 32, "form": "consistency"}


def network():
    return build_network(TABLE, channels=3, resolution=16, num_classes=None)


RAW = {name: value.clone() for name, value in redraw(network()).state_dict().items()}
NOISE = torch.Generator().manual_seed(1)
# No linear map of RAW, so that it is mistaken for nothing else.
EMA = {name: value + 0.02 * torch.randn(value.shape, generator=NOISE) for name, value in RAW.items()}
LONG = {name: value + 1 for name, value in EMA.items()}
OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"params": [0]}]}


def under(prefix, tensors):
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def what(tensors):
    for name, known in (("raw", RAW), ("ema", EMA), ("long", LONG)):
        if tensors.keys() == known.keys() and all(torch.equal(tensors[key], known[key]) for key in known):
            return name
    return "other"


def taken(path, content=None, **options):
    """Return which of the three sets an import takes, and the sentences about it."""
    if content is not None:
        torch.save(content, path)
    found = read_foreign(path, ImportOptions(**GIVEN, **options))
    return what(found.tensors), " ".join(found.notes)


@pytest.mark.parametrize("average", ["model_ema", "state_dict_ema", "ema_model", "net_ema", "ema", "params_ema", "shadow_params", "shadow", "averaged_model", "ema_weights", "ema_state_dict", "model_ema_state_dict", "swa_state_dict", "swa_model", "G_ema", "modelEMA", "modelema", "ema_unet", "polyak", "avg_model", "EMA"])  # fmt: skip
def test_an_average_wins_beside_raw_weights_and_it_is_said(tmp_path, average):
    raw = ("model", "state_dict", "net", "params")[len(average) % 4]
    for content in ({raw: RAW, average: EMA}, {average: EMA, raw: RAW}):
        which, said = taken(tmp_path / "x.pt", {"epoch": 3, "optimizer": OPTIMIZER, **content})
        assert which == "ema"
        assert f"took the average '{average}' beside the raw weights '{raw}'; --weights raw takes those." in said
    which, said = taken(tmp_path / "x.pt", weights="raw")
    assert which == "raw"
    assert f"took the raw weights '{raw}' beside '{average}' (average)" in said
    assert taken(tmp_path / "x.pt", weights=average)[0] == "ema"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["schema"], None),
        (["remainder"], None),
        (["exp_avg"], None),
        (["non_ema"], False),
        (["ema", "online_model"], False),
        (["online", "ema_model"], True),
        (["EMACallback{'decay': 0.999}"], True),
        (["StochasticWeightAveraging", "average_model_state"], True),
        (["model", "emaModel"], True),
        (["theme"], None),
        (["state_dict"], None),
    ],
)
def test_what_a_name_says(names, expected):
    assert says_average(names) is expected


def test_decays_in_names():
    assert [reach_of([name]) for name in ("ema_0.9999", "ema_9999", "ema_0.999_010000", "ema", "ema_2")] == [
        0.9999, 0.9999, 0.999, None, None
    ]  # fmt: skip


# Every way in which wrappers and modules around a network lengthen its names.
PREFIXES = ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "model.", "net.", "module.model.", "model._orig_mod.", "diffusion.unet.", "_forward_module.model.", "inner_model."]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers(tmp_path, prefix):
    assert taken(tmp_path / "x.pt", under(prefix, RAW))[0] == "raw"
    assert taken(tmp_path / "x.pt", {"model": under(prefix, RAW), "ema": under(prefix, EMA)})[0] == "ema"
    assert taken(tmp_path / "x.pt", {"state_dict": under(prefix, RAW), "hyper_parameters": {}})[0] == "raw"


@pytest.mark.parametrize(
    ("raw", "average"),
    list(itertools.product(["model.", "net.", "online_model.", "model._orig_mod.", ""], ["ema_model.", "model_ema.", "ema.module.", "net_ema.model.", "ema_model.module."])),
)  # fmt: skip
def test_both_in_one_state_dict_under_prefixes(tmp_path, raw, average):
    both = under(raw, RAW) | under(average, EMA) | {"loss.scale": torch.zeros(3)}
    for content in (both, {"state_dict": both}, {"model": both}):
        if raw:
            assert taken(tmp_path / "x.pt", content)[0] == "ema"
            assert taken(tmp_path / "x.pt", weights="raw")[0] == "raw"
        else:
            del both["loss.scale"]
            raw = " "
            assert taken(tmp_path / "x.pt", both)[0] == "ema"
            assert taken(tmp_path / "x.pt", both, weights="raw")[0] == "raw"
            return
    save_file({k: v.contiguous() for k, v in both.items()}, str(tmp_path / "x.safetensors"))
    assert taken(tmp_path / "x.safetensors")[0] == "ema"


def averaged_model(average, count=7):
    module = AveragedModel(network())
    module.module.load_state_dict(average)
    module.n_averaged.fill_(count)
    return module.state_dict()


def test_averaged_model_of_torch(tmp_path):
    state = averaged_model(EMA)
    assert "n_averaged" in state
    assert taken(tmp_path / "x.pt", state)[0] == "ema"
    assert taken(tmp_path / "x.pt", {"model": RAW, "swa": state})[0] == "ema"
    # Its own name says nothing, what it holds does.
    which, said = taken(tmp_path / "x.pt", {"model": RAW, "other": state})
    assert which == "ema" and "took the average 'other' beside the raw weights 'model'" in said
    flat = under("net.", RAW) | under("copy.", state)
    assert taken(tmp_path / "x.pt", {"state_dict": flat})[0] == "ema"
    compiled = {name.replace("module.", "module._orig_mod."): value for name, value in state.items()}
    assert taken(tmp_path / "x.pt", compiled)[0] == "ema"


def test_an_average_that_has_averaged_nothing_is_none(tmp_path):
    """torch copies the weights at the first update: before it an AveragedModel holds those it was made with."""
    which, said = taken(tmp_path / "x.pt", {"model": RAW, "swa_model": averaged_model(EMA, 0)})
    assert which == "raw"
    assert "'swa_model' (an average that has averaged nothing yet)" in said
    # Lightning's two ways to say so.
    swa = {"StochasticWeightAveraging": {"n_averaged": 0, "average_model_state": EMA}}
    assert taken(tmp_path / "x.ckpt", {"state_dict": RAW, "callbacks": swa})[0] == "raw"
    moved = {"state_dict": EMA, "current_model_state": RAW}
    assert taken(tmp_path / "x.ckpt", {**moved, "averaging_state": {"n_averaged": torch.tensor(0)}})[0] == "raw"
    assert taken(tmp_path / "x.ckpt", {**moved, "averaging_state": {"n_averaged": torch.tensor(1)}})[0] == "ema"
    # Alone it is what the file holds.
    assert taken(tmp_path / "x.pt", averaged_model(EMA, 0))[0] == "ema"


def test_callbacks_of_lightning(tmp_path):
    base = {"epoch": 1, "pytorch-lightning_version": "2.5.0", "optimizer_states": [OPTIMIZER], "loops": {}}
    raw = under("net.", RAW)
    for callbacks in (
        {"EMA{'decay': 0.999}": {"ema_state_dict": under("net.", EMA)}},
        {"EMACallback": {"ema": under("net.", EMA), "updates": 3}},
        {"EMA": {"cur_step": 3, "ema_weights": list(under("net.", EMA).values())}},
        {"StochasticWeightAveraging": {"n_averaged": 3, "average_model_state": under("net.", EMA)}},
    ):
        content = {**base, "state_dict": raw, "callbacks": {"ModelCheckpoint{}": {"best": 1}, **callbacks}}
        assert taken(tmp_path / "x.ckpt", content)[0] == "ema", callbacks.keys()
        assert taken(tmp_path / "x.ckpt", weights="raw")[0] == "raw"
    # WeightAveraging: the average takes the usual place, the raw weights move aside.
    content = {
        **base,
        "state_dict": under("net.", EMA),
        "current_model_state": raw,
        "averaging_state": {"n_averaged": torch.tensor(9)},
    }
    which, said = taken(tmp_path / "x.ckpt", content)
    assert which == "ema" and "beside the raw weights 'current_model_state.net'" in said
    assert taken(tmp_path / "x.ckpt", weights="raw")[0] == "raw"


def test_ema_pytorch_beside_its_trainer(tmp_path):
    """`ema_model.` and `online_model.` in one state dict, under 'ema', beside the trainer's own model."""
    ema = under("ema_model.model.", EMA) | under("online_model.model.", RAW)
    ema |= {"initted": torch.tensor(True), "step": torch.tensor(40), "ema_model.betas": torch.zeros(5)}
    content = {"step": 40, "model": under("model.", RAW), "ema": ema, "opt": OPTIMIZER}
    assert taken(tmp_path / "x.pt", content)[0] == "ema"
    assert taken(tmp_path / "x.pt", weights="raw")[0] == "raw"
    assert taken(tmp_path / "x.pt", ema)[0] == "ema"


def test_names_without_dots(tmp_path):
    """Latent diffusion's LitEma: buffers cannot have dots in their names."""
    lit = {f"model_ema.unet{name.replace('.', '')}": value for name, value in EMA.items()}
    lit |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(3)}
    content = {"state_dict": under("model.unet.", RAW) | lit | {"betas": torch.zeros(5)}}
    which, said = taken(tmp_path / "x.ckpt", content)
    assert which == "ema" and "'state_dict.model_ema'" in said
    assert taken(tmp_path / "x.ckpt", weights="raw")[0] == "raw"


def test_lists_without_names_follow_the_order_of_parameters(tmp_path):
    for key in ("shadow_params", "ema_weights"):
        content = {
            "model": RAW,
            "ema": {"decay": 0.999, "num_updates": 3, key: list(EMA.values()), "collected_params": list(RAW.values())},
        }
        assert taken(tmp_path / "x.pt", content)[0] == "ema"
        assert taken(tmp_path / "x.pt", weights="raw")[0] == "raw"
    assert taken(tmp_path / "x.pt", {"state_dict": under("module.", RAW), "ema_params": list(EMA.values())})[0] == "ema"
    # NeMo's optimizer holds the list, and torchcontrib's a tensor in the state of each parameter.
    states = {"opt": OPTIMIZER, "ema": tuple(EMA.values()), "current_step": 3}
    assert taken(tmp_path / "x.pt", {"state_dict": RAW, "optimizer_states": [states]})[0] == "ema"
    for key in ("swa_buffer", "param_exp_avg", "ax"):
        state = {index: {"exp_avg": torch.zeros_like(value), key: value} for index, value in enumerate(EMA.values())}
        optimizer = {"state": state, "param_groups": [{"params": list(state)}]}
        which, said = taken(tmp_path / "x.pt", {"model": RAW, "optimizer": optimizer})
        assert which == "ema" and f"'optimizer.{key}'" in said


def test_a_list_in_another_order_is_refused_not_taken(tmp_path):
    """A file whose raw weights were sorted, or whose list was: shapes differ, or the numbers lie across."""
    for values in (
        [EMA[name] for name in sorted(EMA)],
        list(EMA.values())[::-1],
        list(EMA.values())[1:] + list(EMA.values())[:1],
    ):
        torch.save({"model": RAW, "shadow_params": values}, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match="nothing in the file tells their order") as caught:
            taken(tmp_path / "x.pt")
        assert "--weights raw" in caught.value.hint
        assert taken(tmp_path / "x.pt", weights="raw")[0] == "raw"
    # diffusers' average, as accelerate registers it, in a file of its own.
    torch.save({"decay": 0.999, "shadow_params": list(EMA.values())}, tmp_path / "custom_checkpoint_0.pkl")
    with pytest.raises(CheckpointError, match="nothing in the file tells their order"):
        taken(tmp_path / "custom_checkpoint_0.pkl")
    # Two tensors of one shape that changed places: shapes are no help, the numbers are.
    names = list(EMA)
    alike = next(
        (a, b) for a, b in itertools.combinations(names, 2) if EMA[a].ndim == 4 and EMA[a].shape == EMA[b].shape
    )
    swapped = dict(zip(alike, alike[::-1], strict=True))
    torch.save({"model": RAW, "shadow_params": [EMA[swapped.get(name, name)] for name in names]}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="nothing in the file tells their order"):
        taken(tmp_path / "x.pt")


def test_an_average_of_parameters_gets_its_buffers_from_the_raw_weights(tmp_path):
    state = foreign.state("edm_ncsnpp")
    buffers = [name for name in state if name.endswith(("freqs", "resample_filter"))]
    moved = {name: value if name in buffers else value + 0.1 for name, value in state.items()}
    short = {name: value for name, value in moved.items() if name not in buffers}
    for average in (short, list(short.values())):
        torch.save({"net": state, "ema": average}, tmp_path / "x.pt")
        found = read_foreign(tmp_path / "x.pt", ImportOptions())
        assert "tensors that it lacks came from the raw weights" in " ".join(found.notes)
        assert all(torch.equal(found.tensors[name.removeprefix("model.")], value) for name, value in moved.items())


def test_averages_of_several_lengths(tmp_path):
    for content in (
        {"model": RAW, "ema_0.999": EMA, "ema_0.9999": LONG},
        {"model": RAW, "ema": {0.999: EMA, 0.9999: LONG}},
        {"net": RAW, "ema": {"stds": [0.05, 0.1], "emas": [EMA, LONG]}},
        {"model": RAW, "ema_999": EMA, "ema_9999": LONG},
    ):
        which, said = taken(tmp_path / "x.pt", content)
        assert which == "long" and "also there: 'ema" in said and "(--weights NAME)" in said
    assert taken(tmp_path / "x.pt", weights="ema_999")[0] == "ema"
    torch.save({"model": RAW, "ema_a": EMA, "ema_b": LONG}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds several averages: 'ema_a', 'ema_b'") as caught:
        taken(tmp_path / "x.pt")
    assert caught.value.hint == "name one: --weights ema_a"
    assert taken(tmp_path / "x.pt", weights="ema_b")[0] == "long"


def test_teachers_and_targets_are_not_the_model(tmp_path):
    other = {name: value * 2 for name, value in RAW.items()}
    for role in ("teacher", "target_model", "teacher_ema", "discriminator"):
        assert taken(tmp_path / "x.pt", {role: other, "student": RAW})[0] == "raw"
        assert taken(tmp_path / "x.pt", {role: other, "student": RAW, "student_ema": EMA})[0] == "ema"
    flat = under("teacher.", other) | under("student.", RAW) | under("student_ema.", EMA)
    assert taken(tmp_path / "x.pt", {"state_dict": flat})[0] == "ema"
    assert taken(tmp_path / "x.pt", {"model": RAW, "ema_target": other})[0] == "raw"
    torch.save({"one": RAW, "two": EMA}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds several sets of weights: 'one', 'two'"):
        taken(tmp_path / "x.pt")


def test_lists_of_states_as_score_based_code_writes_them(tmp_path):
    assert taken(tmp_path / "x.pt", [under("module.", RAW), OPTIMIZER, 3, 400, under("module.", EMA)])[0] == "ema"
    assert taken(tmp_path / "x.pt", [RAW, OPTIMIZER, 3, 400])[0] == "raw"


def test_timm_and_k_diffusion(tmp_path):
    args = argparse.Namespace(lr=1e-3, model="adm")
    timm = {"epoch": 1, "arch": "adm", "state_dict": RAW, "optimizer": OPTIMIZER, "version": 2, "args": args, "metric": 0.5, "state_dict_ema": OrderedDict(EMA)}  # fmt: skip
    assert taken(tmp_path / "x.pth.tar", timm)[0] == "ema"
    config = {"model": {"type": "image_v1"}}
    inner = {"config": config, "model": under("inner_model.", RAW), "model_ema": under("inner_model.", EMA), "opt": OPTIMIZER, "ema_sched": {"inv_gamma": 1.0}}  # fmt: skip
    assert taken(tmp_path / "x.pth", inner)[0] == "ema"


def test_one_set_alone(tmp_path):
    assert taken(tmp_path / "x.pt", {"model": RAW, "ema": None})[0] == "raw"
    assert taken(tmp_path / "x.pt", {"model": RAW, "ema": {}})[0] == "raw"
    assert "no average is there; took the raw weights 'model'." in taken(tmp_path / "x.pt")[1]
    assert "took" not in taken(tmp_path / "y.pt", RAW)[1]
    shared = {"model": RAW, "ema": RAW}
    assert taken(tmp_path / "x.pt", shared)[0] == "raw"


@pytest.mark.parametrize(
    ("file", "content", "wanted", "words"),
    [
        ("x.pt", {"model": RAW}, "ema", "x.pt holds no average"),
        (
            "x.pt",
            {"model_ema": EMA},
            "raw",
            "x.pt holds no raw weights; it holds 'model_ema'|x.pt holds no raw weights",
        ),
        ("x.pt", RAW, "ema", "holds no average, but one set of weights alone, which it does not call an average"),
        ("ema_0.9999_010000.pt", EMA, "raw", "holds no raw weights, but one set of weights alone, an average, as its"),
        (
            "x.pt",
            {"model": RAW, "ema": EMA},
            "swa",
            r"holds no weights 'swa'; it holds 'model' \(raw\), 'ema' \(average\)",
        ),
    ],
)
def test_weights_that_are_not_there_are_one_sentence(tmp_path, file, content, wanted, words):
    torch.save(content, tmp_path / file)
    with pytest.raises(UserError, match=words) as caught:
        import_model(tmp_path / file, tmp_path / "m.safetensors", ImportOptions(**GIVEN, weights=wanted))
    assert "\n" not in caught.value.message
    assert not (tmp_path / "m.safetensors").exists()


def test_a_series_of_guided_diffusion(tmp_path):
    """model, ema_RATE_ and opt files of several steps in one folder, or one of them named by itself."""
    for step in ("010000", "020000"):
        torch.save(RAW, tmp_path / f"model{step}.pt")
        torch.save(EMA, tmp_path / f"ema_0.999_{step}.pt")
        torch.save(LONG, tmp_path / f"ema_0.9999_{step}.pt")
    (tmp_path / "opt020000.pt").write_bytes(b"")
    which, said = taken(tmp_path)
    assert which == "long" and "beside the raw weights 'model'" in said and "also there: 'ema_0.999'" in said
    assert taken(tmp_path, weights="raw")[0] == "raw"
    assert taken(tmp_path, weights="ema_0.999")[0] == "ema"
    which, said = taken(tmp_path / "model010000.pt")
    assert which == "raw" and "import ema_0.9999_010000.pt or ema_0.999_010000.pt to take it" in said
    assert "an average next to" not in taken(tmp_path / "ema_0.999_010000.pt")[1]


@pytest.mark.parametrize(
    ("raw", "average"), [("last.ckpt", "last-EMA.ckpt"), ("model.pt", "model_ema.pt"), ("net.pth", "ema_net.pth")]
)
def test_an_average_in_a_file_beside_is_said(tmp_path, raw, average):
    torch.save(RAW, tmp_path / raw)
    torch.save(EMA, tmp_path / average)
    torch.save(EMA, tmp_path / "unrelated_ema.pt")
    which, said = taken(tmp_path / raw)
    assert which == "raw" and f"there is an average next to {raw}: import {average} to take it." in said
    assert "an average next to" not in taken(tmp_path / average)[1]


def test_snapshots_with_raw_weights_beside_the_average(tmp_path):
    """NVlabs' pickles: 'ema' and 'net' as modules."""
    state = foreign.state("edm_ddpmpp")
    raw = {name: value * 2 if value.ndim else value for name, value in state.items()}
    with foreign.nvlabs(), open(tmp_path / "s.pkl", "wb") as stream:
        both = {"net": foreign.module_tree(raw, "EDMPrecond"), "ema": foreign.module_tree(state, "EDMPrecond")}
        foreign.pickle.dump({**both, "loss_fn": foreign.Persistent("EDMLoss", {"P_mean": -1.2})}, stream)
    for wanted, right in ((None, state), ("ema", state), ("raw", raw), ("net", raw)):
        found = read_foreign(tmp_path / "s.pkl", ImportOptions(weights=wanted))
        name = "map_layer0.weight"
        assert torch.equal(found.tensors[name], right[f"model.{name}"])
        assert any("took the" in note for note in found.notes)
    with pytest.raises(UserError, match="holds no weights 'swa'"):
        read_foreign(tmp_path / "s.pkl", ImportOptions(weights="swa"))


def test_flax_checkpoints(tmp_path):
    state = foreign.state("jax_ncsnpp")
    tree = foreign.flax_state(state)
    tree["params"] = foreign.flax_state({name: value * 2 for name, value in state.items()})["params_ema"]
    (tmp_path / "checkpoint_1").write_bytes(foreign.pack(tree))
    average, raw = (read_foreign(tmp_path / "checkpoint_1", ImportOptions(weights=name)) for name in (None, "raw"))
    assert any("took the average 'params_ema' beside the raw weights 'params'" in note for note in average.notes)
    name = "map_layer0.weight"
    assert torch.equal(raw.tensors[name], 2 * average.tensors[name])


def pipeline(folder, **sets):
    """A diffusers training checkpoint: one subfolder for each set, all multiplied by its factor."""
    meta, *_ = foreign.golden("diffusers_imagenet64")
    for name, factor in sets.items():
        (folder / name).mkdir(parents=True)
        tensors = {key: value * factor for key, value in foreign.state("diffusers_imagenet64").items()}
        save_file(tensors, str(folder / name / "diffusion_pytorch_model.safetensors"), metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **meta["full"]}))
    return folder


def factor(path, **options):
    found = read_foreign(path, ImportOptions(**options))
    right = foreign.state("diffusers_imagenet64")["conv_in.weight"].flatten()[0]
    return round(float(found.tensors["input_blocks.0.0.weight"].flatten()[0] / right), 3), " ".join(found.notes)


def test_a_training_checkpoint_of_diffusers(tmp_path):
    folder = pipeline(tmp_path / "checkpoint-500", unet=1, unet_ema=2)
    for index in (None, "ConsistencyModelPipeline"):
        if index:
            (folder / "model_index.json").write_text(json.dumps({"_class_name": index}))
        value, said = factor(folder)
        assert value == 2 and "took the average 'unet_ema' beside the raw weights 'unet'; --weights raw" in said
        assert factor(folder, weights="raw")[0] == 1
        assert factor(folder, weights="unet")[0] == 1
    value, said = factor(folder / "unet")
    assert value == 1 and "there is an average next to unet: import unet_ema to take it." in said
    with pytest.raises(UserError, match="holds no average"):
        factor(pipeline(tmp_path / "other", unet=1), weights="ema")
    assert factor(pipeline(tmp_path / "alone", unet_ema=2))[0] == 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"bin": 1, "fp16.safetensors": 2}, 1),
        ({"safetensors": 1, "fp16.safetensors": 2}, 1),
        ({"bin": 1, "fp16.bin": 2}, 1),
        ({"fp16.bin": 2, "fp32.safetensors": 1}, 1),
        ({"fp16.safetensors": 2}, 2),
        ({"bin": 2, "safetensors": 1}, 1),
        ({"safetensors": 1, "ema.safetensors": 3}, 3),
        ({"safetensors": 1, "ema.fp16.safetensors": 3}, 3),
        ({"safetensors": 3, "non_ema.safetensors": 1}, 3),
        ({"half.safetensors": 2, "fp32.safetensors": 1}, 1),
    ],
)
def test_of_several_files_the_full_one_and_the_average_win(tmp_path, files, expected):
    folder = pipeline(tmp_path, unet=1)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    for ending, number in files.items():
        half = torch.float16 if "16" in ending or "half" in ending else torch.float32
        tensors = {k: (v * number).to(half) for k, v in foreign.state("diffusers_imagenet64").items()}
        # A file whose name says nothing may hold halves all the same.
        path = folder / f"unet/diffusion_pytorch_model.{ending.replace('half.', '')}"
        torch.save(tensors, path) if ending.endswith("bin") else save_file(tensors, str(path))
    value, said = factor(folder)
    assert value == pytest.approx(expected, rel=1e-3)
    if len(files) > 1 and any("16" in ending for ending in files) and expected == 1:
        assert "in full precision, not" in said
    if 3 in files.values():
        assert "took the average" in said
        assert factor(folder, weights="raw")[0] == 1


def test_full_precision_in_several_files_wins_over_a_half_in_one(tmp_path):
    folder = pipeline(tmp_path, unet=1)
    state = foreign.state("diffusers_imagenet64")
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    whole.rename(whole.with_name("diffusion_pytorch_model.fp16.safetensors"))
    save_file(
        {k: (v * 2).half() for k, v in state.items()}, str(whole.with_name("diffusion_pytorch_model.fp16.safetensors"))
    )
    names, places = sorted(state), {}
    for index, part in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-0000{index + 1}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, str(folder / "unet" / file))
        places |= dict.fromkeys(part, file)
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert factor(folder)[0] == 1
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../x"}})
    )
    with pytest.raises(CheckpointError, match="names no safetensors files"):
        factor(folder)


def test_of_two_sets_of_one_kind_the_one_in_full_precision_wins(tmp_path):
    halves = {name: (value * 2).half() for name, value in RAW.items()}
    assert taken(tmp_path / "x.pt", {"model": halves, "model_fp32": RAW})[0] == "raw"
    assert taken(tmp_path / "x.pt", {"ema": halves, "ema_fp32": EMA, "model": RAW})[0] == "ema"
    which, said = taken(tmp_path / "x.pt", {"ema": halves, "model": RAW})
    assert which == "other" and "took the average 'ema'" in said
    torch.save(RAW, tmp_path / "net.pt")
    said = taken(tmp_path / "net.fp16.pt", halves)[1]
    assert "net.fp16.pt is in half precision; net.pt next to it is not." in said


def test_a_file_that_holds_itself_is_answered(tmp_path):
    loop = {"model": RAW}
    loop["again"] = [loop] * 300
    torch.save(loop, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="nests its contents without end"):
        taken(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "extra",
    [
        {"optimizer": {"state": {}, "param_groups": [{"params": 3}, 4, {"params": [[1], None, {}]}]}},
        {"optimizer": {"state": {0: 1}, "param_groups": [{"params": [0], "param_names": 7}]}},
        {"n_averaged": float("nan"), "averaging_state": 3, "stds": ["a"], "emas": [RAW]},
        {"ema": [torch.zeros(2, dtype=torch.complex64), torch.tensor(1)], "stds": [None, "x"]},
        {1: {None: {("a", 2): torch.zeros(3)}}, "ema": [[[torch.zeros(2)]]]},
    ],
)
def test_odd_company_is_no_obstacle(tmp_path, extra):
    torch.save({"model": RAW, **extra}, tmp_path / "x.pt")
    assert taken(tmp_path / "x.pt", weights="model")[0] == "raw"


def test_import_as_typed(cmtool, workdir):
    torch.save({"model": RAW, "model_ema": EMA}, workdir / "x.pt")
    words = ("import", "x.pt", "--resolution", 16, "--head-channels", 32, "--form", "consistency", "--out")
    done = cmtool(*words, "m.safetensors")
    assert done.code == 0
    assert "took the average 'model_ema' beside the raw weights 'model'; --weights raw takes those." in done.err
    assert what(models.load(workdir / "m.safetensors").network.state_dict()) == "ema"
    assert read_header(workdir / "m.safetensors")["origin"]["weights"] == "model_ema"
    assert cmtool(*words, "r.safetensors", "--weights", "raw").code == 0
    assert what(models.load(workdir / "r.safetensors").network.state_dict()) == "raw"
    done = cmtool(*words, "n.safetensors", "--weights", "shadow")
    assert done.code == 1 and "holds no weights 'shadow'; it holds 'model' (raw), 'model_ema' (average)." in done.err
    done = cmtool("import", "openai/cd_imagenet64_l2", "--out", "n.safetensors", "--weights", "raw")
    assert done.code == 1 and "openai/cd_imagenet64_l2 is one set of weights" in done.err
    assert not (workdir / "n.safetensors").exists()


def test_copies_of_a_network_are_left_as_they_are():
    assert what(copy.deepcopy(RAW)) == "raw"
