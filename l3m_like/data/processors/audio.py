"""Sound, as one channel of samples."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec

if TYPE_CHECKING:
    from l3m_like.data.dataset import Visit

EXTENSIONS = ("wav", "flac", "mp3", "ogg", "opus", "m4a")


class Audio:
    """``wav``/``flac``/``mp3``/``ogg``/``opus``/``m4a`` -> ``audio`` float32 [round(sample_rate * seconds)] in [-1, 1], and
    ``audio_length`` int64 []: how many of them are sound.

    The mean of the channels. Of a longer sound a part is taken, whose start is drawn anew for every sample and epoch; a
    shorter one is followed by zeros.

    Args:
        sample_rate: in Hz; sound of another rate is resampled.
        seconds: length of what is made.

    Raises:
        UserError: a sample without sound, or one that cannot be decoded.
    """

    unit = "sounds"

    def __init__(self, sample_rate: int, seconds: float) -> None:
        self.sample_rate = sample_rate
        self.length = round(sample_rate * seconds)
        if sample_rate < 1 or self.length < 1:
            raise UserError(f"sample_rate is {sample_rate} and seconds {seconds}; that is less than one sample.")

    def keys(self) -> dict[str, KeySpec]:
        return {
            "audio": KeySpec(torch.float32, (self.length,), sequence_dim=0, meaning=f"sound at {self.sample_rate} Hz"),
            "audio_length": KeySpec(torch.int64, (), meaning="samples before the padding"),
        }

    def check(self) -> None:
        """Nothing to read ahead."""

    def __call__(self, sample: Mapping[str, bytes], visit: Visit) -> dict[str, np.ndarray]:
        import av  # heavy, and only sound needs it

        extension = next((name for name in EXTENSIONS if name in sample), None)
        if extension is None:
            raise UserError(f"the sample has {sorted(sample)}; it needs one of {list(EXTENSIONS)}.")
        try:
            sound = self._read(sample[extension])
        except av.FFmpegError as error:
            raise UserError(f"the sound cannot be decoded: {error}") from error
        start = visit.draws("start").integer(max(len(sound) - self.length, 0) + 1)
        part = sound[start : start + self.length]
        audio = np.zeros(self.length, dtype=np.float32)
        audio[: len(part)] = part
        return {"audio": audio, "audio_length": np.array(len(part), dtype=np.int64)}

    def _read(self, content: bytes) -> np.ndarray:
        """The whole sound at ``sample_rate``, float32 [samples]."""
        import av

        resampler = av.AudioResampler(format="fltp", rate=self.sample_rate)
        with av.open(io.BytesIO(content), "r") as container:
            if not container.streams.audio:
                raise UserError("the file has no sound.")
            frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
            frames += resampler.resample(None) if frames else []  # what the filter still holds
        if not frames:
            raise UserError("the sound is empty.")
        # mixed here: the resampler would make two equal channels louder, beyond [-1, 1]
        return np.concatenate([frame.to_ndarray().mean(0) for frame in frames])
