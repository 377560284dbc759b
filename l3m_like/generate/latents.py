"""From latents back to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l3m_like.core.errors import UserError


class LatentDecoder:
    """The decoder of diffusers' ``AutoencoderKL``, as a sampler's ``decoder``: latents [B, c, h, w] as a model makes them ->
    pictures [B, C, H, W] in about [-1, 1]. Its weights are read when it is first used.

    Args:
        folder: of the autoencoder (``config.json`` and its weights).
        scale, shift: as in ``SampleLatent``.
        dtype: in which it computes.

    Raises:
        UserError: no such folder, when it is used; no such dtype.
    """

    def __init__(self, folder: str, scale: float = 0.18215, shift: float = 0.0, dtype: str = "float32") -> None:
        self.folder, self.scale, self.shift = Path(folder).expanduser(), scale, shift
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise UserError(f"LatentDecoder: there is no dtype '{dtype}'. Write float32, bfloat16 or float16.")
        self.dtype = found
        self._model: Any = None

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        if self._model is None:
            self._model = self._load().to(latents.device)
        out = self._model.decode((latents / self.scale + self.shift).to(self.dtype)).sample
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def _load(self) -> Any:
        from l3m_like.blocks.preprocessors.autoencoder_kl import autoencoder_kl

        if not (self.folder / "config.json").is_file():
            raise UserError(f"LatentDecoder: there is no autoencoder in {self.folder} (its config.json and weights).")
        try:
            model = autoencoder_kl().from_pretrained(self.folder, local_files_only=True, torch_dtype=self.dtype)
        except (OSError, ValueError) as error:
            raise UserError(f"LatentDecoder: {self.folder} cannot be read: {error}") from error
        del model.encoder
        return model.eval().requires_grad_(False)
