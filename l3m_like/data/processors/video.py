"""A video, as frames of one size, and its class."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec
from l3m_like.data.processors.pixels import Pixels

if TYPE_CHECKING:
    from l3m_like.data.dataset import Visit

EXTENSIONS = ("mp4", "webm", "mkv", "mov")


class Video(Pixels):
    """``mp4``/``webm``/``mkv``/``mov`` -> ``video`` float32 [frames, C, size, size]: a sequence of images, in the layout
    of ``image``. The frames are cut, mirrored and changed alike.

    Args:
        frames: how many (F).
        size: see ``Pixels``.
        stride: take every ``stride``-th frame of the file, from a start drawn anew for every sample and epoch.
        fps: take the frames that are shown at times 1 / fps seconds apart, from a start drawn likewise. Neither: the middle
            frames of F equal parts of the whole video.
        picture: further arguments of ``Pixels``.

    Raises:
        UserError: both ``stride`` and ``fps``; a sample without video; one that cannot be decoded, or is too short.
    """

    unit = "videos"

    def __init__(self, frames: int, size: int, *, stride: int | None = None, fps: float | None = None, **picture: Any) -> None:
        super().__init__(size, **picture)
        if frames < 1 or (stride is not None and stride < 1) or (fps is not None and fps <= 0):
            raise UserError(f"frames is {frames}, stride {stride}, fps {fps}; each is at least 1 (fps: above 0).")
        if stride is not None and fps is not None:
            raise UserError(f"stride is {stride} and fps {fps}; give one of them.")
        self.frames = frames
        self.stride = stride
        self.fps = fps

    def keys(self) -> dict[str, KeySpec]:
        image = self.image_keys()["image"]
        return {"video": KeySpec(torch.float32, (self.frames, *image.dims), meaning=f"frames, {image.meaning}")}

    def __call__(self, sample: Mapping[str, bytes], visit: Visit) -> dict[str, np.ndarray]:
        import av  # heavy, and only videos need it

        extension = next((name for name in EXTENSIONS if name in sample), None)
        if extension is None:
            raise UserError(f"the sample has {sorted(sample)}; it needs one of {list(EXTENSIONS)}.")
        try:
            return {"video": self._read(sample[extension], visit)}
        except av.FFmpegError as error:
            raise UserError(f"the video cannot be decoded: {error}") from error

    def _read(self, content: bytes, visit: Visit) -> np.ndarray:
        import av

        with av.open(io.BytesIO(content), "r") as container:
            if not container.streams.video:
                raise UserError("the file has no video stream.")
            stream = container.streams.video[0]
            # when each frame is shown, without decoding any
            packets = ((packet.pts, packet.is_discard) for packet in container.demux(stream))
            times = sorted(pts for pts, discarded in packets if pts is not None and not discarded)
            seconds = np.array(times) * float(stream.time_base or 0)
            wanted = [times[place] for place in self._places(seconds, visit)]
            container.seek(wanted[0], stream=stream)  # to the key frame before it
            made: dict[int, np.ndarray] = {}
            for frame in container.decode(stream):
                if frame.pts in wanted:
                    upright = frame.to_image().rotate(frame.rotation, expand=True)  # phones film on their side
                    made[frame.pts] = self.array(upright.convert("L" if self.channels == 1 else "RGB"), visit)
                if frame.pts is not None and frame.pts >= wanted[-1]:
                    break
        missing = sorted(set(wanted) - set(made))
        if missing:
            raise UserError(f"the video cannot be decoded: {len(missing)} of the {self.frames} frames wanted are broken.")
        return np.stack([made[pts] for pts in wanted])

    def _places(self, times: np.ndarray, visit: Visit) -> list[int]:
        """Numbers of the frames to take, of a video whose frames are shown at ``times`` in seconds."""
        count = len(times)
        if self.fps is not None:
            # the last frame is shown for as long as frames are on average
            length = (times[-1] - times[0]) * count / (count - 1) if count > 1 else 0.0
            needed = (self.frames - 1) / self.fps
            if count == 0 or needed >= max(length, 1e-9):
                raise UserError(
                    f"the video is {length:.2f} s long; {self.frames} frames at fps {self.fps} need more than {needed:.2f} s. "
                    "Take fewer frames, a greater fps, or leave the sample out."
                )
            start = times[0] + visit.draws("start").uniform(0.0, length - needed)
            shown = np.searchsorted(times, start + np.arange(self.frames) / self.fps + 1e-9, side="right") - 1
            return [int(place) for place in np.clip(shown, 0, count - 1)]
        needed = (self.frames - 1) * (self.stride or 1) + 1
        if count < needed:
            raise UserError(
                f"the video has {count} frames; {self.frames} frames with stride {self.stride or 1} need {needed}. Take fewer "
                "frames, a smaller stride, or leave the sample out."
            )
        if self.stride is None:
            return [(2 * k + 1) * count // (2 * self.frames) for k in range(self.frames)]
        start = visit.draws("start").integer(count - needed + 1)
        return [start + k * self.stride for k in range(self.frames)]


class ClassVideo(Video):
    """What ``Video`` makes, and ``cls`` -> ``video_label`` int64 []. The arguments are those of ``Video``."""

    def keys(self) -> dict[str, KeySpec]:
        return super().keys() | {"video_label": KeySpec(torch.int64, (), meaning="class number")}

    def __call__(self, sample: Mapping[str, bytes], visit: Visit) -> dict[str, np.ndarray]:
        if "cls" not in sample:
            raise UserError(f"the sample has {sorted(sample)}; it needs 'cls' and one of {list(EXTENSIONS)}.")
        return super().__call__(sample, visit) | {"video_label": np.array(int(sample["cls"]), dtype=np.int64)}
