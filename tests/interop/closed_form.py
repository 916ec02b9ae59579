"""Weights and inputs as a formula of their name and index: the same numbers on every machine, in every library.

The golden outputs beside this file were computed once by the foreign implementations from exactly these weights.
"""

import math
import zlib

import numpy as np


def uniform(name, shape):
    """Values in [-1, 1), exact in float32: a splitmix64 hash of (name, index)."""
    with np.errstate(over="ignore"):
        state = np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state += np.uint64(zlib.crc32(name.encode())) << np.uint64(20)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return ((state >> np.uint64(40)).astype(np.float64) / 2**23 - 1).astype(np.float32).reshape(shape)


def weight(name, shape, fan_in=None):
    """One tensor of a network, large enough that no layer hides: unit gain for matrices, 1 +- 0.3 for norms."""
    values = uniform(name, shape)
    if name.endswith(("freqs", "GaussianFourierProjection_0/W")):
        return values * np.float32(2)
    if len(shape) > 1:
        return values * np.float32(math.sqrt(3 / (fan_in or math.prod(shape[1:]))))
    middle = np.float32(1 if name.endswith(("weight", "scale", "gain")) else 0)
    return np.asarray(middle + np.float32(0.3) * values)


def flax_weight(name, shape):
    """The same for flax leaves, whose last axis is the output."""
    return weight(name, shape, fan_in=math.prod(shape[:-1]))


def noisy_images(shape, times):
    """x (len(times), *shape): images in [-1, 1] with noise of each level."""
    image, noise = uniform("image", (len(times), *shape)), uniform("noise", (len(times), *shape)) * np.float32(1.7)
    return image + np.asarray(times, np.float32)[:, None, None, None] * noise
