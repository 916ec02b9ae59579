"""Tiny models with random weights, written as the project writes models, and the command line as it is typed."""

import json

from cmtool.checkpoint import save_model
from cmtool.models import build_model
from cmtool.rng import generator


def write_model(
    folder,
    name="tiny",
    kind="consistency",
    channels=3,
    resolution=8,
    num_classes=None,
    names=None,
    source="shapes",
    times=None,
    label_dropout=0.0,
    edit=None,
):
    """Write runs/<name>/model.safetensors below `folder` and return its path."""
    points = source == "toy2d"
    network = (
        {"kind": "mlp", "channels": 16, "num_blocks": 1}
        if points
        else {"kind": "adm", "channels": 8, "channel_mult": [1], "head_channels": 8}
    )
    header = {
        "kind": kind,
        "preset": "tiny",
        "recipe_name": kind,
        "step": 3,
        "seed": 0,
        "network": network,
        "process": {"parameterization": "consistency" if kind == "consistency" else "edm"},
        "data": {"source": source, "resolution": 1 if points else resolution, "channels": 2 if points else channels,
                 "num_classes": num_classes, "class_names": names, "fingerprint": "x", "float_samples": points},
        "times": times or {}, "label_dropout": label_dropout, **({"edit": edit} if edit else {}),
    }  # fmt: skip
    model = build_model(header)
    # Fresh networks end in zeros; numbers everywhere make every pixel depend on the noise and the label.
    random = generator(3, name)
    tensors = {
        key: value.detach().clone().normal_(0, 0.2, generator=random)
        for key, value in model.network.state_dict().items()
    }
    path = folder / "runs" / name / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(path, tensors, header)
    return path


class Shell:
    """Types command lines in a folder of its own: `out(...)` is stdout of a success, `fails(...)` (code, stderr)."""

    def __init__(self, folder, capfd):
        self.folder, self._capfd = folder, capfd

    def __call__(self, *arguments):
        from cmtool.cli.app import run

        code = run([str(argument) for argument in arguments])
        said = self._capfd.readouterr()
        return code, said.out, said.err

    def out(self, *arguments):
        code, out, err = self(*arguments)
        assert code == 0, err
        return out.strip()

    def json(self, *arguments):
        return json.loads(self.out(*arguments, "--json"))

    def fails(self, *arguments):
        code, out, err = self(*arguments)
        assert code in (1, 2), (code, out, err)
        assert "Traceback" not in err
        assert err.count("Error:") == 1
        return err
