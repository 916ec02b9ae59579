"""Raw networks F(x, c_noise, label, r), each usable under forward-mode differentiation."""

from cmtool.networks.blocks import RawNetwork, set_attention_kernel
from cmtool.networks.build import build_network, parameter_count

__all__ = ["RawNetwork", "build_network", "parameter_count", "set_attention_kernel"]
