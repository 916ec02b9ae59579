"""The page that adds a method shows what is in the code, in under 40 lines."""

import math
import re
from pathlib import Path

import pytest
import torch

from cmtool.config.parts import DistancePart
from cmtool.errors import ConfigError
from cmtool.losses.assemble import build_distance
from tests.losses.oracles import D, config_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r'```python title="([^"]+)"\n(.*?)```', PAGE, re.DOTALL)


def test_every_line_shown_is_in_the_code():
    assert len(BLOCKS) == 4
    for name, block in BLOCKS:
        source = (ROOT / name).read_text(encoding="utf-8").splitlines()
        for line in block.splitlines():
            assert line in source, (name, line)


def test_it_takes_as_few_lines_as_the_page_says():
    lines = [line for _, block in BLOCKS for line in block.splitlines() if line.strip()]
    assert f"It takes {len(lines)} lines." in PAGE.replace("\n", " ")
    assert len(lines) < 40


def test_cauchy_distance_at_its_constant():
    b = torch.full((1, 1, 2, 2), 0.25, dtype=D)  # of norm one half
    distance = build_distance(DistancePart(kind="cauchy", c=0.5), 4).between(0 * b, b)
    assert float(distance) == pytest.approx(math.log(1.5))


def test_cauchy_without_a_scale_is_refused():
    with pytest.raises(ConfigError, match="without a scale"):
        config_of("ict-cauchy", "recipe.distance.c=0.0")
