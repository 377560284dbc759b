"""How good frozen features are: nearest neighbours, a linear probe, an attentive probe.

All of them extract the features of two sets once, on all data-parallel ranks together; what follows is small, and every rank
computes it alike. So the result does not depend on the number of processes or on the run's batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.errors import UserError
from l3m_like.core.random import normal, uniform
from l3m_like.distributed.mesh import Mesh, broadcast_object
from l3m_like.evaluations.evaluation import Findings
from l3m_like.evaluations.features import Extractor, LabelledSet, accuracy, labelled

TOP = {"top1": 1, "top5": 5}


class _Probe:
    """What the probes share.

    Args:
        data: the set that is classified, in file order.
        train: the set that the probe learns from.
        key: of the features [B, S, D] or [B, D], in the inference graph.
        label: of the classes.
        pool: "mean", "first" or "last" of the tokens.
        batch: rows of a forward pass.
    """

    def __init__(
        self, data: Any, train: Any, key: str = "image_features", label: str = "image_label", pool: str = "mean", batch: int = 64
    ) -> None:
        self.data, self.train = data, train
        self.key, self.label, self.pool, self.batch = key, label, pool, batch

    def check(self, model: nn.Module) -> None:
        for data in (self.data, self.train):
            Extractor(model, self.key, data.keys())

    def evaluate(self, model: nn.Module, *, mesh: Mesh, step: int, seed: int, folder: Path) -> Findings:
        known, asked = (
            labelled(model, data, mesh, key=self.key, label=self.label, pool=self.pool, batch=self.batch, seed=seed)
            for data in (self.train, self.data)
        )
        classes = max(known.classes, asked.classes)
        values = broadcast_object(accuracy(self.scores(known, asked.features, classes, seed), asked.labels, TOP))
        notes = {"features": f"{self.key}, pool {self.pool}", "learned from": f"{len(known.labels)} images"}
        return Findings(values, notes=notes)

    def scores(self, known: LabelledSet, features: Tensor, classes: int, seed: int) -> Tensor:
        """Scores [n, classes] of ``features`` [n, ...]."""
        raise UserError(f"{type(self).__name__} does not define scores(...).")


class NearestNeighbours(_Probe):
    """Votes of the nearest training images by cosine, each weighing exp(cosine / temperature) (Wu et al., arXiv:1805.01978,
    section 3.4, with DINO's numbers).

    Args:
        neighbours: that vote.
        temperature: of their weights.
        settings: those of all probes: data, train, key, label, pool, batch.
    """

    def __init__(self, neighbours: int = 20, temperature: float = 0.07, **settings: Any) -> None:
        super().__init__(**settings)
        if neighbours < 1 or temperature <= 0:
            raise UserError(f"NearestNeighbours: neighbours {neighbours} is at least 1, temperature {temperature} above 0.")
        self.neighbours, self.temperature = neighbours, temperature

    def scores(self, known: LabelledSet, features: Tensor, classes: int, seed: int) -> Tensor:
        bank, out = F.normalize(known.features, dim=-1), []
        for part in F.normalize(features, dim=-1).split(1024):
            near, place = (part @ bank.T).topk(min(self.neighbours, len(bank)), dim=1)
            votes = part.new_zeros(len(part), classes)
            out.append(votes.scatter_add_(1, known.labels[place], (near / self.temperature).exp()))
        return torch.cat(out)


class LinearProbe(_Probe):
    """Logistic regression on standardised features, to convergence (L-BFGS on the whole set, as CLIP's linear probe:
    arXiv:2103.00020, appendix A.3). It has no learning rate, order or augmentation, and so no luck.

    Args:
        decay: weight of half the squared norm of the matrix, beside the mean loss.
        iterations: of L-BFGS, at most.
        settings: those of all probes: data, train, key, label, pool, batch.
    """

    def __init__(self, decay: float = 1e-4, iterations: int = 200, **settings: Any) -> None:
        super().__init__(**settings)
        if decay < 0 or iterations < 1:
            raise UserError(f"LinearProbe: decay {decay} is at least 0, iterations {iterations} at least 1.")
        self.decay, self.iterations = decay, iterations

    def scores(self, known: LabelledSet, features: Tensor, classes: int, seed: int) -> Tensor:
        deviation, mean = torch.std_mean(known.features, dim=0)
        given, asked = ((x - mean) / (deviation + 1e-6) for x in (known.features, features))
        weight, bias = (given.new_zeros(shape).requires_grad_() for shape in ((classes, given.shape[1]), (classes,)))
        search = torch.optim.LBFGS(
            [weight, bias], max_iter=self.iterations, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            search.zero_grad()
            value = F.cross_entropy(F.linear(given, weight, bias), known.labels) + self.decay / 2 * weight.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            search.step(loss)  # type: ignore[arg-type]
        return F.linear(asked, weight, bias).detach()


class AttentiveProbe(_Probe):
    """A learned query attends to all tokens, and a linear map classifies what it found (AIM, arXiv:2401.08541, section 4.1): for
    features whose information lies in no single token. All tokens of both sets are held in memory.

    Args:
        num_heads: of the attention.
        epochs: passes over the training set.
        rows: of a step.
        lr: peak learning rate of AdamW; it falls to 0 as a cosine.
        decay: weight decay.
        settings: those of all probes but the pool: data, train, key, label, batch.
    """

    def __init__(
        self, num_heads: int, epochs: int = 20, rows: int = 64, lr: float = 1e-3, decay: float = 1e-2, **settings: Any
    ) -> None:
        super().__init__(**{**settings, "pool": "none"})
        if "pool" in settings:
            raise UserError("AttentiveProbe pools by attention; remove `pool`.")
        if min(num_heads, epochs, rows) < 1 or lr <= 0:
            raise UserError(f"AttentiveProbe: num_heads {num_heads}, epochs {epochs}, rows {rows}: at least 1; lr {lr}: above 0.")
        self.num_heads, self.epochs, self.rows, self.lr, self.decay = num_heads, epochs, rows, lr, decay

    def scores(self, known: LabelledSet, features: Tensor, classes: int, seed: int) -> Tensor:
        tokens, labels = known.features, known.labels
        if tokens.ndim != 3 or tokens.shape[2] % self.num_heads:
            raise UserError(f"AttentiveProbe: features {list(tokens.shape)} are no tokens [n, S, D], D divisible by num_heads.")
        deviation, mean = torch.std_mean(tokens, dim=(0, 1))
        given, asked = ((x - mean) / (deviation + 1e-6) for x in (tokens, features))
        dim = tokens.shape[2]
        one = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        shapes = {"query": (dim,), "key": (dim, dim), "value": (dim, dim), "out": (classes, dim)}
        weights = {
            name: normal(one, shape, seed=seed, purpose=f"attentive_probe/{name}")[0].mul(dim**-0.5).requires_grad_()
            for name, shape in shapes.items()
        }
        bias = tokens.new_zeros(classes).requires_grad_()

        def scored(x: Tensor) -> Tensor:
            heads = (self.num_heads, -1)
            keys, values = (F.linear(x, weights[name]).unflatten(-1, heads).transpose(1, 2) for name in ("key", "value"))
            query = weights["query"].view(1, self.num_heads, 1, -1).expand(len(x), -1, -1, -1)
            found = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(1)
            return F.linear(found, weights["out"], bias)

        steps = max(len(given) // self.rows, 1)
        optimizer = torch.optim.AdamW([*weights.values(), bias], lr=self.lr, weight_decay=self.decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * self.epochs)
        with torch.enable_grad():
            for epoch in range(self.epochs):
                drawn = uniform(one + epoch, (len(given),), seed=seed, purpose="attentive_probe/order", dtype=torch.float64)
                for chosen in drawn[0].argsort().split(self.rows)[:steps]:
                    optimizer.zero_grad()
                    F.cross_entropy(scored(given[chosen]), labels[chosen]).backward()
                    optimizer.step()
                    schedule.step()
        return torch.cat([scored(part).detach() for part in asked.split(1024)])
