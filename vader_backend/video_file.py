"""Videos as mp4 files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import torch
from torch import Tensor

from .checkpoint import atomic_path
from .config import InputError

_SMALL = 192  # players show videos below this many pixels as a stamp, or refuse them
_QUALITY = {"crf": "16", "preset": "medium"}


def write_mp4(path: Path, video_TCHW: Tensor, fps: float) -> None:
    """Write a video as h264 (yuv420p) in an mp4 container, atomically.

    Small videos are enlarged by a whole factor; an odd height or width gets one more row or column.

    Args:
        video_TCHW: [T, 3, H, W] in [0, 1].

    Raises:
        InputError: the video or fps is unusable, or the file cannot be written.
    """
    if video_TCHW.ndim != 4 or video_TCHW.shape[1] != 3 or not video_TCHW.numel():
        raise InputError(f"The video to save has the shape {tuple(video_TCHW.shape)}; it must be [frames, 3, H, W].")
    if not 0 < fps <= 1000:
        raise InputError(f"fps is {fps}; it must be above 0 and at most 1000.")
    pixels_THWC = _pixels(video_TCHW)
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=_QUALITY)
        stream.height, stream.width = pixels_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in pixels_THWC.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def read_mp4(path: Path) -> Tensor:
    """All frames of a video file: float32 [T, 3, H, W] in [0, 1].

    Raises:
        InputError: the file is missing or is no video.
    """
    try:
        with av.open(str(path)) as container:
            frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    except (OSError, IndexError, ValueError) as error:
        raise InputError(f"The video {path} cannot be read ({error}); choose another file.") from error
    if not frames:
        raise InputError(f"The video {path} has no frames; choose another file.")
    return torch.stack(frames).permute(0, 3, 1, 2).float() / 255


def shown_size(height: int, width: int) -> int:
    """The whole factor by which a video of this size is enlarged for viewing."""
    return max(1, -(-_SMALL // max(height, width)))


def _pixels(video_TCHW: Tensor) -> Tensor:
    """uint8 [T, H, W, 3] of even size, on the CPU."""
    pixels = (video_TCHW.detach().float().cpu().nan_to_num(0).clamp(0, 1) * 255).round().byte()
    factor = shown_size(*pixels.shape[-2:])
    for dim in (-2, -1):
        pixels = pixels.repeat_interleave(factor, dim)
        if pixels.shape[dim] % 2:
            pixels = torch.cat([pixels, pixels.narrow(dim, -1, 1)], dim)
    return pixels.permute(0, 2, 3, 1).contiguous()
