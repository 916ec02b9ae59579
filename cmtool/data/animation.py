"""Frames of an interpolation as an animated GIF."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor

from cmtool.data.images import Bytes, to_nhwc
from cmtool.files.atomic import atomic_write

# Smaller pictures are enlarged by whole factors, or a viewer shows a stamp.
SMALLEST_SIDE = 128


def save_gif(frames: Tensor | Bytes, path: str | Path, seconds_per_frame: float = 1 / 12, loop: bool = True) -> Path:
    """Write frames (B, C, H, W) in [-1, 1], or bytes (B, H, W, C), as a GIF.

    Every frame has a palette of its own 256 colors; `loop` plays for ever.
    """
    array = to_nhwc(frames)
    factor = max(1, -(-SMALLEST_SIDE // array.shape[1]))
    pictures = []
    for frame in array:
        image = Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        pictures.append(image if image.mode == "L" else image.convert("RGB").quantize(256))
    target = Path(path)
    with atomic_write(target) as temporary:
        pictures[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=round(1000 * seconds_per_frame),
            disposal=2,
            **({"loop": 0} if loop else {}),
        )
    return target
