"""The ADM U-Net has the published files' names and shapes, checked against a table written by hand.

Each row of a table is one entry of `input_blocks` or `output_blocks`: "A>B" a residual block, "*" attention after
it, "d" or "u" a residual block that halves or doubles the side.
"""

import pytest
import torch

from cmtool.config.networks import network_config
from cmtool.networks import build_network, parameter_count

IMAGENET64 = network_config(
    channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3, attention=(32, 16, 8), head_channels=64
)
LSUN256 = network_config(
    channels=256,
    channel_mult=(1, 1, 2, 2, 4, 4),
    num_blocks=2,
    attention=(32, 16, 8),
    head_channels=64,
    scale_shift=False,
)
IMAGENET64_INPUT = "192>192, 192>192, 192>192, d192, 192>384*, 384>384*, 384>384*, d384, 384>576*, 576>576*, 576>576*, d576, 576>768*, 768>768*, 768>768*"
IMAGENET64_OUTPUT = (
    "1536>768*, 1536>768*, 1536>768*, 1344>768*u, 1344>576*, 1152>576*, 1152>576*, 960>576*u, "
    "960>384*, 768>384*, 768>384*, 576>384*u, 576>192, 384>192, 384>192, 384>192"
)
LSUN256_INPUT = (
    "256>256, 256>256, d256, 256>256, 256>256, d256, 256>512, 512>512, d512, 512>512*, 512>512*, d512, "
    "512>1024*, 1024>1024*, d1024, 1024>1024*, 1024>1024*"
)
LSUN256_OUTPUT = (
    "2048>1024*, 2048>1024*, 2048>1024*u, 2048>1024*, 2048>1024*, 1536>1024*u, 1536>512*, 1024>512*, 1024>512*u, "
    "1024>512, 1024>512, 768>512u, 768>256, 512>256, 512>256u, 512>256, 512>256, 512>256"
)


def pair(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def residual(prefix, cin, cout, emb, film):
    keys = pair(f"{prefix}.in_layers.0", cin) | pair(f"{prefix}.in_layers.2", cout, cin, 3, 3)
    keys |= pair(f"{prefix}.emb_layers.1", (2 if film else 1) * cout, emb)
    keys |= pair(f"{prefix}.out_layers.0", cout) | pair(f"{prefix}.out_layers.3", cout, cout, 3, 3)
    return keys | (pair(f"{prefix}.skip_connection", cout, cin, 1, 1) if cin != cout else {})


def attention(prefix, width):
    return (
        pair(f"{prefix}.norm", width)
        | pair(f"{prefix}.qkv", 3 * width, width, 1, 1)
        | pair(f"{prefix}.proj_out", width, width, 1, 1)
    )


def entry(prefix, text, emb, film):
    if text[0] == "d":
        return residual(f"{prefix}.0", int(text[1:]), int(text[1:]), emb, film)
    cin, cout = (int(part) for part in text.rstrip("*u").split(">"))
    keys = residual(f"{prefix}.0", cin, cout, emb, film)
    keys |= attention(f"{prefix}.1", cout) if "*" in text else {}
    return keys | (residual(f"{prefix}.{2 if '*' in text else 1}", cout, cout, emb, film) if text.endswith("u") else {})


def expected(width, emb, film, classes, inputs, outputs, deepest):
    keys = pair("time_embed.0", emb, width) | pair("time_embed.2", emb, emb) | pair("input_blocks.0.0", width, 3, 3, 3)
    keys |= {"label_emb.weight": (classes, emb)} if classes else {}
    for index, text in enumerate(inputs.split(", "), start=1):
        keys |= entry(f"input_blocks.{index}", text, emb, film)
    keys |= residual("middle_block.0", deepest, deepest, emb, film) | attention("middle_block.1", deepest)
    keys |= residual("middle_block.2", deepest, deepest, emb, film)
    for index, text in enumerate(outputs.split(", ")):
        keys |= entry(f"output_blocks.{index}", text, emb, film)
    return keys | pair("out.0", width) | pair("out.2", 3, width, 3, 3)


@pytest.mark.parametrize(
    ("config", "resolution", "classes", "tensors", "count", "table"),
    [
        (
            IMAGENET64,
            64,
            1000,
            541,
            295_899_267,
            expected(192, 768, True, 1000, IMAGENET64_INPUT, IMAGENET64_OUTPUT, 768),
        ),
        (LSUN256, 256, None, 566, 526_304_771, expected(256, 1024, False, 0, LSUN256_INPUT, LSUN256_OUTPUT, 1024)),
    ],
    ids=["imagenet64", "lsun256"],
)
def test_names_shapes_and_counts_are_the_published_ones(config, resolution, classes, tensors, count, table):
    with torch.device("meta"):
        network = build_network(config, channels=3, resolution=resolution, num_classes=classes)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert len(shapes) == tensors
    assert shapes == table
    assert parameter_count(network) == count
