"""Classification by what classes are called, without training on any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.errors import UserError
from l3m_like.distributed.mesh import Mesh, broadcast_object
from l3m_like.evaluations.evaluation import Findings
from l3m_like.evaluations.features import Extractor, accuracy, labelled

#: keys of a sentence
_TEXT = ("text_ids", "text_mask", "row")


class ZeroShot:
    """The class whose name is nearest to an image, by embeddings of a contrastive model (CLIP, arXiv:2103.00020, section 3.1).

    The embedding of a class is the mean over sentences with its name, made of length 1.

    Args:
        data: images with classes; its processor, a ``CaptionedImage``, makes tokens of the sentences.
        names: of the classes, in the order of their numbers.
        templates: sentences with ``{}`` for the name.
        image, text, label: keys of the embeddings [B, E] and the classes.
        batch: rows of a forward pass.
    """

    def __init__(
        self,
        data: Any,
        names: Sequence[str],
        templates: Sequence[str] = ("{}",),
        image: str = "image_embedding",
        text: str = "text_embedding",
        label: str = "image_label",
        batch: int = 64,
    ) -> None:
        for template in templates:
            if template.count("{}") != 1:
                raise UserError(f"ZeroShot: the template '{template}' has no one place {{}} for the name.")
        if not hasattr(data.process, "padded"):
            raise UserError(f"ZeroShot: {type(data.process).__name__} makes no captions; read the data with CaptionedImage.")
        self.data, self.names, self.templates = data, list(names), list(templates)
        self.image, self.text, self.label, self.batch = image, text, label, batch

    def check(self, model: nn.Module) -> None:
        Extractor(model, self.image, self.data.keys())
        Extractor(model, self.text, _TEXT)

    def evaluate(self, model: nn.Module, *, mesh: Mesh, step: int, seed: int, folder: Path) -> Findings:
        classes = self.class_embeddings(model, mesh)
        found = labelled(model, self.data, mesh, key=self.image, label=self.label, pool="none", batch=self.batch, seed=seed)
        values = broadcast_object(accuracy(found.features @ classes.T, found.labels, {"top1": 1, "top5": 5}))
        return Findings(values, notes={"prompts": f"{len(self.templates)} of each of {len(self.names)} names"})

    def class_embeddings(self, model: nn.Module, mesh: Mesh) -> Tensor:
        """[classes, E]; every rank computes all of them."""
        process = self.data.process
        texts = [process.padded(process.tokens(template.format(name))) for name in self.names for template in self.templates]
        extract, parts = Extractor(model, self.text, _TEXT), []
        for start in range(0, len(texts), self.batch):
            some = texts[start : start + self.batch]
            data = {key: torch.stack([torch.from_numpy(text[key]) for text in some]).to(mesh.device) for key in some[0]}
            parts.append(extract(data | {"row": torch.arange(len(some), device=mesh.device)}))
        each = torch.cat(parts)  # at least float32, as the head makes them
        each = each.unflatten(0, (len(self.names), len(self.templates)))
        return F.normalize(each.mean(1), dim=-1)
