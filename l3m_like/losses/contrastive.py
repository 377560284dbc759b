"""Contrastive losses of images and texts, over the whole batch on all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from l3m_like.kernels.linear_cross_entropy import linear_cross_entropy
from l3m_like.losses.loss import Loss

#: logits of ``SigmoidContrastive`` that exist at a time
_CHUNK_ELEMENTS = 1 << 26


class _OverPairs(Loss):
    """Rows of images against rows of texts; row i of both belongs together.

    In an evaluation, which has no gradient, it is over the pairs of one rank's batch, and so depends on ``batch.micro``.
    """

    scope = "batch"
    splits = True
    _mesh: Any = None

    def bind(self, mesh: Any) -> None:
        self._mesh = mesh

    @property
    def mesh(self) -> Any:
        """None: there are no other rows."""
        return self._mesh if torch.is_grad_enabled() and self._mesh is not None and self._mesh.dp_size > 1 else None

    def count(self, row: Tensor) -> Tensor:
        return torch.tensor(row.numel(), dtype=torch.int64)


class Contrastive(_OverPairs):
    """CLIP (Radford et al., arXiv:2103.00020, figure 3): the mean of two cross-entropies, of each image's own text among all
    texts and of each text's own image among all images.

    A rank holds logits of its own rows alone, in chunks; embeddings of other ranks are gathered, and their gradients sent back.

    Reads   image_embedding, text_embedding [B, E] of length 1; logit_scale [], the factor on cosines
    Counts  rows
    """

    def compute(self, image_embedding: Tensor, text_embedding: Tensor, logit_scale: Tensor) -> Tensor:
        dtype = torch.promote_types(image_embedding.dtype, torch.float32)
        image, text, scale = image_embedding.to(dtype), text_embedding.to(dtype), logit_scale.to(dtype)
        own, all_images, all_texts = torch.arange(image.shape[0], device=image.device), image, text
        if self.mesh is not None:
            own = own + self.mesh.dp_rank * image.shape[0]
            all_images, all_texts = self.mesh.gather_rows(torch.stack((image, text), dim=1)).unbind(1)  # in one message
        to_text = linear_cross_entropy(image * scale, all_texts, own)
        to_image = linear_cross_entropy(text * scale, all_images, own)
        return (to_text.sum() + to_image.sum()) / 2


class SigmoidContrastive(_OverPairs):
    """SigLIP (Zhai et al., arXiv:2303.15343, algorithm 1): every pair of the batch is a yes-or-no question of its own,
    ``-log sigmoid(y (scale * cos + bias))``, y = 1 for a row's own text and -1 for the others; sum over texts, mean over images.

    Texts go round the ranks in a ring, so that one rank's texts against another's images are all that is ever held.

    Reads   image_embedding, text_embedding [B, E] of length 1; logit_scale, logit_bias []
    Counts  rows
    """

    def compute(self, image_embedding: Tensor, text_embedding: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        dtype = torch.promote_types(image_embedding.dtype, torch.float32)
        image, text = image_embedding.to(dtype) * logit_scale.to(dtype), text_embedding.to(dtype)
        bias = logit_bias.to(dtype)
        # -log sigmoid(z) = softplus(z) - z: what is due to own texts, on top of what each pair would cost as a stranger
        total = -((image * text).sum(-1) + bias).sum()
        steps = 1 if self.mesh is None else self.mesh.dp_size
        rows = max(1, _CHUNK_ELEMENTS // text.shape[0])
        for step in range(steps):
            for part in image.split(rows):
                total = total + checkpoint(_strangers, part, text, bias, use_reentrant=False, preserve_rng_state=False)
            if step + 1 < steps:
                text = self.mesh.pass_rows_on(text)
        return total


def _strangers(image: Tensor, text: Tensor, bias: Tensor) -> Tensor:
    """The sum over all pairs of ``-log sigmoid(-z)``."""
    return F.softplus(image @ text.T + bias).sum()
