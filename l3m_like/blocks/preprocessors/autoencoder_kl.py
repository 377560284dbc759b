"""Pictures as latents of a variational autoencoder (latent diffusion, arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.random import normal

#: of an ``AutoencoderKL``'s config.json, what the encoder depends on
FIELDS = (
    "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block",
    "mid_block_add_attention", "norm_num_groups", "use_quant_conv",
)  # fmt: skip


class AutoencoderKLEncoder(ReadWriteBlock):
    """The encoder of diffusers' ``AutoencoderKL``: mean and standard deviation of a picture's latent. Put it into a ``Frozen``,
    and give its weights by ``init.parts``: the folder of such a model.

    Reads   image [B, C, H, W] in [-1, 1]
    Writes  moments [B, 2 c, h, w], at least float32: c channels of the mean, then c of the standard deviation

    Args:
        config: fields of its ``config.json``.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.

    Raises:
        UserError: diffusers is not installed; a field that the class does not have.
    """

    outputs = ("moments",)

    def __init__(self, config: Mapping[str, Any], **ports: Any) -> None:
        super().__init__(**ports)
        model = autoencoder_kl()(**checked(config))
        #: ``FIELDS`` of its config.json
        self.config = fields_of(config)
        self.encoder = model.encoder
        self.quant_conv = model.quant_conv

    def compute(self, image: Tensor) -> Tensor:
        found = self.encoder(image.to(self.encoder.conv_in.weight.dtype))
        if self.quant_conv is not None:
            found = self.quant_conv(found)
        mean, log_variance = found.to(torch.promote_types(found.dtype, torch.float32)).chunk(2, dim=1)
        return torch.cat((mean, (log_variance.clamp(-30, 20) / 2).exp()), 1)


class SampleLatent(ReadWriteBlock):
    """Draw a latent from its moments, and scale it to about unit variance: (mean + std noise - shift) scale.

    Reads   moments [B, 2 c, h, w]: mean, then standard deviation; row [B] int64
    Writes  latent [B, c, h, w]

    Args:
        seed: of the run; the noise is a function of (seed, stream, row), so every epoch draws anew.
        scale, shift: of the autoencoder (its ``scaling_factor`` and ``shift_factor``).
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("latent",)

    def __init__(self, seed: int, scale: float = 0.18215, shift: float = 0.0, **ports: Any) -> None:
        super().__init__(**ports)
        if not scale > 0:
            raise UserError(f"SampleLatent: scale is {scale}; it must be above 0.")
        self.seed, self.scale, self.shift = seed, scale, shift

    def compute(self, moments: Tensor, row: Tensor) -> Tensor:
        mean, std = moments.chunk(2, dim=1)
        noise = normal(row, tuple(mean.shape[1:]), seed=self.seed, purpose=f"latent/{self.stream or ''}").to(mean.dtype)
        return (mean + std * noise - self.shift) * self.scale


def autoencoder_kl() -> Any:
    """The class of diffusers, imported when it is needed."""
    from l3m_like.core.torchvision_ops import allow_torchvision

    allow_torchvision()
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError("AutoencoderKL: the package is not installed. Run: pip install diffusers") from error
    return AutoencoderKL


def defaults() -> dict[str, Any]:
    """Of every field that the class has."""
    import inspect

    found = inspect.signature(autoencoder_kl().__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in found if parameter.default is not parameter.empty}


def checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those that begin with ``_`` (of the file, not of the model)."""
    from l3m_like.core.errors import did_you_mean

    known = defaults()
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    for name in given:
        if name not in known:
            raise UserError(f"AutoencoderKL: its config has no field '{name}'. {did_you_mean(name, known)}")
    return given


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """``FIELDS`` of a ``config.json``, what it leaves out filled in."""
    known = defaults()
    values = {name: config.get(name, known[name]) for name in FIELDS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
