"""What all networks share: heads of attention, and sums and activations in place."""

import pytest
import torch
import torch.nn.functional as F

from cmtool.networks.blocks import heads_of, joined
from cmtool.networks.normalization import activated


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_are_the_published_channels(interleaved, layout):
    qkv = drawn(2, 3 * 8, 3, 5).to(memory_format=layout).requires_grad_()
    found = heads_of(qkv, 2, interleaved)
    for which, part in enumerate(found):
        assert part.shape == (2, 2, 15, 4)
        for head in range(2):
            for channel in range(4):
                at = (head * 4 + channel) * 3 + which if interleaved else (which * 2 + head) * 4 + channel
                assert torch.equal(part[:, head, :, channel], qkv[:, at].flatten(1))
    (gradient,) = torch.autograd.grad(sum((part * (1 + i)).sum() for i, part in enumerate(found)), qkv)
    order = torch.arange(24) % 3 if interleaved else torch.arange(24) // 8
    assert torch.equal(gradient, (1.0 + order)[None, :, None, None].expand_as(qkv))


def test_heads_of_images_that_lie_channels_last_are_views_of_them():
    qkv = drawn(2, 24, 4, 4).to(memory_format=torch.channels_last)
    assert all(part.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for part in heads_of(qkv, 2))
    # The fused kernel takes what has a head's channels side by side.
    assert all(part.stride(-1) == 1 for form in (False, True) for part in heads_of(qkv, 2, form))


def test_in_place_only_where_no_gradients_are_recorded():
    x, y = drawn(2, 3, 4, 4), drawn(2, 3, 4, 4, seed=1)
    wanted, total = F.silu(x), x + y
    kept = x.clone()
    assert torch.equal(activated(kept), wanted)
    assert torch.equal(kept, x)
    assert torch.equal(joined(kept, y), total)
    assert torch.equal(kept, x)
    with torch.no_grad():
        branch = x.clone()
        assert joined(branch, y).data_ptr() == branch.data_ptr()
        assert torch.equal(branch, total)
        kept = x.clone()
        assert activated(kept).data_ptr() == kept.data_ptr()
        assert torch.equal(kept, wanted)
        # A half that meets float32 is widened, as ever.
        half = x.bfloat16()
        assert torch.equal(joined(half, y), half + y)
        assert joined(half, y).dtype == torch.float32
