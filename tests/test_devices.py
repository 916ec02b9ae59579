"""Devices: no float64 where a device may have none, and the same samples on each from the same noise."""

from __future__ import annotations

import ast

import pytest
import torch

import cmtool
from cmtool.diffusion.process import VarianceExploding, exact
from tests.test_architecture import PACKAGE

# Rooms whose tensors lie on the device. Whatever else is float64 is made on the CPU (grids, random numbers) and says here
# why it never meets a device without float64.
ROOMS = (
    "diffusion",
    "schedules",
    "networks",
    "losses",
    "samplers",
    "editing",
    "training",
    "models.py",
    "rng.py",
    "api",
)
ALLOWED = {
    "diffusion/process.py exact": "the one way from a device to float64",
    "diffusion/parameterization.py ddpm_levels": "a table, where `exact` has put the levels",
    "schedules/times.py": "times are drawn, and tables of levels made, on the CPU",
    "losses/diagnose.py level_density": "a table of levels, on the CPU",
    "losses/objective.py uniforms": "random numbers, on the CPU",
    "losses/direction.py posterior_mean": "asks for the device",
    "networks/dit.py sincos_positions": "made on the CPU, then moved",
    "editing/operators.py measured": "pictures, on the CPU",
    "losses/legs.py middle": "random numbers, on the CPU",
    "losses/direction.py guidances": "random numbers, on the CPU",
    "editing/windows.py taper": "made on the CPU, then moved",
    "editing/subject.py": "pictures, on the CPU",
    "samplers/interpolation.py path": "shares of a path, on the CPU",
    "editing/loop.py luma_vector": "made on the CPU, then moved",
    "samplers/generate.py streams_for": "float64 for a float64 model alone",
    "models.py apply_precision": "float64 models are refused on mps",
    "training/precision.py": "float64 models are refused on mps",
    "training/sharding.py": "several GPUs, never mps",
    "training/posthoc.py": "files, on the CPU",
    "training/report.py gathered": "after everything is on the CPU",
    "api/model.py sample": "float64 for a float64 model alone",
    "rng.py": "random numbers, on the CPU",
}


def doubles(tree: ast.AST, function: str = "") -> set[str]:
    """Names of the functions that mention torch.float64 or call .double()."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        name = node.name if isinstance(node, ast.FunctionDef) else function
        whole = isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.float64", "torch.double")
        if whole or (isinstance(node, ast.Attribute) and node.attr == "double"):
            found.add(name)
        found |= doubles(node, name)
    return found


def test_float64_is_only_where_no_device_lacks_it():
    seen = set()
    for path in sorted(path for room in ROOMS for path in (PACKAGE / room).rglob("*.py")) + [
        PACKAGE / room for room in ROOMS if room.endswith(".py")
    ]:
        file = str(path.relative_to(PACKAGE))
        for function in doubles(ast.parse(path.read_text(encoding="utf-8"))):
            allowed = {file, f"{file} {function}"} & ALLOWED.keys()
            assert allowed, f"{file} {function}: float64 does not exist on mps; use cmtool.diffusion.process.exact"
            seen |= allowed
    assert seen == ALLOWED.keys(), f"no longer needed: {sorted(ALLOWED.keys() - seen)}"


class Elsewhere:
    """What `exact` sees of a tensor on an MPS device."""

    device = torch.device("mps")

    def cpu(self):
        return torch.tensor([1.5])

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")


def test_float64_of_a_device_without_it_is_on_the_cpu():
    assert exact(Elsewhere()).dtype == torch.float64
    x = torch.tensor([0.1, 80.0])
    assert torch.equal(exact(x), x.double())


def test_renoising_keeps_device_and_precision():
    x0, z, t = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.tensor([0.002, 2.0])
    made = VarianceExploding().renoise(x0, z, t)
    assert made.dtype == torch.float32 and made.device == x0.device
    assert made[0].abs().max() < 1e-6 and abs(float(made[1, 0, 0, 0]) - (4 - 0.002**2) ** 0.5) < 1e-6


OTHERS = [
    name for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())) if there
]


@pytest.mark.skipif(not OTHERS, reason="needs a second kind of device (cuda or mps)")
@pytest.mark.parametrize("name", ["demo/digits", "demo/shapes"])
def test_devices_agree_on_the_same_noise(name):
    """One and two steps; pixels lie in [-1, 1]."""
    for steps in (1, 2):
        here = cmtool.load(name, "cpu").sample(8, steps=steps, seed=0)
        for device in OTHERS:
            there = cmtool.load(name, device).sample(8, steps=steps, seed=0)
            assert float((here - there).abs().max()) < 1e-2


def test_a_device_that_rounds_otherwise_gives_the_same_samples():
    """What the test above asks, asked of rounding alone: float64 against float32 on the same noise."""
    module = cmtool.load("demo/digits", "cpu")
    plain = module.sample(8, seed=0)
    exactly = cmtool.load("demo/digits", "cpu")
    exactly.module.double()
    assert float((plain - exactly.sample(8, seed=0)).abs().max()) < 1e-2
