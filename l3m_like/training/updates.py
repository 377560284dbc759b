"""Updates: which parts run, which terms they are trained on, and which parameters that changes.

Most experiments have one. An autoencoder with a discriminator has two, in file order. Every parameter belongs to exactly one
update, or is frozen. Keys that a later update reads are handed on detached, as they were before the earlier one's step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from l3m_like.config.schema import Update as UpdateConfig
from l3m_like.core.block import Data
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.meta_model import Graph, MetaModel
from l3m_like.core.wiring import Program
from l3m_like.distributed.compiled import is_compiled
from l3m_like.distributed.gradients import gradient_norm, sum_partial_gradients, tp_summed_parameters
from l3m_like.distributed.mesh import Mesh
from l3m_like.distributed.parallelize import reshard
from l3m_like.losses.loss import Loss
from l3m_like.training.optim import Guard, build_optimizer, matching


@dataclass
class Update:
    """One update of a run; see the module's docstring. ``prepare`` adds what needs the sharded model."""

    name: str
    parts: Mapping[str, MetaModel]
    losses: Mapping[str, Loss]
    patterns: Sequence[str]
    settings: Any
    start: int = 0
    every: int = 1
    precision: str = "fp32"
    adaptive: AdaptiveWeight | None = None
    #: of the parts, those that run as at inference
    inference: Sequence[str] = ()
    graphs: Mapping[str, Graph] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def program(self) -> Program:
        return Program(self.name, self.parts, self.losses, inference=self.inference)

    def active(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == 0

    def prepare(self, mesh: Mesh, guard: Guard) -> None:
        """Build the optimizer over this update's (sharded) parameters."""
        self.optimizer = build_optimizer(self.parameters, self.parts, self.settings, mesh, self.precision)
        self.guard = guard
        if self.adaptive is not None:
            self.adaptive.check(self.name, self.parts.values())
        self.tp_summed = tp_summed_parameters(self.parts.values())
        #: the blocks that this update trains, and those that nothing trains: a block follows the steps of its own update
        own, blocks = {id(p) for p in self.parameters.values()}, [b for part in self.parts.values() for _, b in part.blocks()]
        self.followed = [b for b in blocks if not any(True for _ in b.parameters()) or any(id(p) in own for p in b.parameters())]

    def _needed(self, step: int) -> tuple[list[str], dict[str, Loss]]:
        """The parts and the terms that run at ``step``: terms that have begun, and parts that they, or later updates, read."""
        losses = {name: loss for name, loss in self.losses.items() if step >= loss.start}
        if len(losses) == len(self.losses):
            return list(self.parts), losses
        read = {key for loss in losses.values() for key in loss.reads.values()} | set(self.keep)
        parts: list[str] = []
        for name in reversed(list(self.parts)):
            graph = self.graphs[name]
            if read & {key for step in graph.steps for key in step.block.writes_in(graph.inference).values()}:
                read |= {key for step in graph.steps for key in step.block.reads.values()}
                parts.insert(0, name)
        return parts, losses

    def whole_batch(
        self, number: int, micro: Callable[[int], Data], totals: Mapping[str, float], mesh: Mesh, step: int = 0
    ) -> Sequence[Share | None]:
        """For each of ``number`` micro-batches, its share in the terms that are no sum over them (``scope: batch``); None: there
        are none, or one micro-batch is the whole batch.

        The features that the terms read are computed for every micro-batch without a graph and joined, the terms give their
        gradients, and every micro-batch then goes forward a second time, with its own part of these (GradCache, Gao et al.,
        arXiv:2101.06983): exact, and only features of the whole batch are in memory.

        Args:
            micro: makes micro-batch i, with torch's generators seeded for it: its two forwards draw the same.
        """
        parts, losses = self._needed(step)
        terms = {name: loss for name, loss in losses.items() if loss.scope == "batch"}
        if number == 1 or not terms:
            return [None] * number
        keys = dict.fromkeys(key for loss in terms.values() for key in loss.reads.values())
        with torch.no_grad():
            made = [{key: value for key, value in self._forward(parts, micro(i)).items() if key in keys} for i in range(number)]
        # a scalar is a parameter of the model, not of rows
        joined = {key: made[0][key] if made[0][key].ndim == 0 else torch.cat([data[key] for data in made]) for key in made[0]}
        leaves = {key: value.requires_grad_() for key, value in joined.items() if value.is_floating_point()}
        with torch.enable_grad():
            sums, plain = self._terms(terms, joined, totals, mesh)
            objective = _total(self._weighted(plain))
        grads: dict[str, Tensor] = {}
        if objective is not None:
            found = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
            grads = {key: grad for key, grad in zip(leaves, found, strict=True) if grad is not None}
        shares = [Share(sums if i == 0 else {}, {}, bool(plain)) for i in range(number)]
        for key, grad in grads.items():
            if grad.ndim == 0:
                shares[0].gradients[key] = grad
            else:
                for share, part in zip(shares, grad.split([len(data[key]) for data in made]), strict=True):
                    share.gradients[key] = part
        return shares

    def forward_backward(
        self, data: Data, totals: Mapping[str, float], mesh: Mesh, step: int = 0, share: Share | None = None
    ) -> tuple[dict[str, Tensor], Data]:
        """One micro-batch: the parts, the terms, the backward pass. Returns each term's (sum, count) and the carried keys.

        ``share``: of ``whole_batch``, instead of the terms that it has computed.
        """
        parts, losses = self._needed(step)
        data = self._forward(parts, data)
        here = {name: loss for name, loss in losses.items() if share is None or loss.scope != "batch"}
        sums, plain = self._terms(here, data, totals, mesh)
        weighted = self._weighted(plain)
        if self.adaptive is not None and self.adaptive.term in here:
            term = self.adaptive.term  # its own weight multiplies the adaptive one, so it is balanced without it
            weighted[term] = weighted[term] * self.adaptive.weight(weighted | {term: plain[term]}, mesh)
        if share is not None:
            sums |= share.sums
            reached = {key: grad for key, grad in share.gradients.items() if data[key].requires_grad}
            if share.trains and not reached:
                raise UserError(_NO_GRADIENT.format(", ".join(name for name in losses if name not in here)))
            weighted |= {f"share of {key}": (data[key] * grad).sum() for key, grad in reached.items()}
        objective = _total(weighted)
        assert objective is not None
        objective.backward()
        return sums, {key: data[key].detach() for key in self.keep}

    def _forward(self, parts: Sequence[str], data: Data) -> Data:
        for name in parts:
            data = self.parts[name](data, self.graphs[name])
        return data

    def _terms(
        self, losses: Mapping[str, Loss], data: Data, totals: Mapping[str, float], mesh: Mesh
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Each term's (sum, count) for people, and the value of those with a weight, without it."""
        sums, plain = {}, {}
        for name, loss in losses.items():
            value, count = loss.term(data, totals.get(name), mesh)
            if loss.weight is not None:
                plain[name] = value / (count if isinstance(count, Tensor) else max(count, 1.0))
                if torch.is_grad_enabled() and not plain[name].requires_grad:
                    raise UserError(_NO_GRADIENT.format(name))
            if not isinstance(count, Tensor):
                # a fill: a copy from the host would wait for the device
                count = torch.full((), count, dtype=torch.float64, device=value.device)
            sums[name] = torch.stack((value.detach().double(), count.detach().double()))
        return sums, plain

    def _weighted(self, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: (self.losses[name].weight or 0.0) * value for name, value in plain.items()}

    def step(self, mesh: Mesh, lr_scale: float) -> tuple[Tensor, Tensor]:
        """Clip and step. Returns the gradient norm before clipping and whether the step was skipped, as device scalars."""
        sum_partial_gradients(self.tp_summed, mesh)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = mesh.agree(gradient_norm(gradients))
        bad = self.guard.bad(norm)
        clip = self.settings.clip
        # the optimizers divide by it where they read the gradients: clipping costs no pass of its own
        excess = None if clip is None else ((norm + 1e-6) / clip).clamp(min=1.0)
        self.optimizer.set_lr_scale(lr_scale)
        self.optimizer.step(found_inf=bad, grad_scale=excess)
        self.optimizer.zero_grad(set_to_none=True)
        for block in self.followed:
            block.after_step(mesh, bad)
        for part in self.parts.values():
            # a part that ran without a backward pass would stay gathered, with the gradients that this update asks for
            reshard(part)
        return norm, bad

    def train_only_own(self, updates: Sequence[Update]) -> None:
        """Turn gradients off for the parameters of the other updates (no-op where there is one)."""
        if len(updates) > 1:
            for update in updates:
                for parameter in update.parameters.values():
                    parameter.requires_grad_(update is self)


@dataclass(frozen=True)
class Share:
    """What terms of the whole batch say to one micro-batch; see ``Update.whole_batch``."""

    #: each term's (sum, count), in the first micro-batch's share alone
    sums: Mapping[str, Tensor]
    #: of the objective, by the keys of the features
    gradients: dict[str, Tensor]
    #: whether one of the terms has a weight
    trains: bool


_NO_GRADIENT = (
    "loss.{} has a weight, but no gradient reaches a trained parameter (it goes through a Frozen, or all that it reads is data). "
    "Say `weight: null` if it is a metric."
)


def _total(terms: Mapping[str, Tensor]) -> Tensor | None:
    total: Tensor | None = None
    for value in terms.values():
        total = value if total is None else total + value
    return total


class AdaptiveWeight:
    """The weight of one term from gradients: ``|grad of against| / (|grad of term| + 1e-6)`` at a named Linear's weight.

    As in VQGAN (Esser et al., arXiv:2012.09841, eq. 7), clamped to [0, max], without gradient. Both gradients are taken
    from the forward that the update ran for its loss, at the layer's output, turned into weight gradients and summed over
    the data-parallel ranks, so that the weight is that of the whole batch. It refuses gradient accumulation.
    """

    def __init__(self, term: str, against: Sequence[str], at: str, maximum: float) -> None:
        self.term, self.against, self.at, self.maximum = term, tuple(against), at, maximum
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    def attach(self, parts: Mapping[str, MetaModel]) -> None:
        modules = {f"{name}.{path}" if name else path: m for name, part in parts.items() for path, m in part.named_modules()}
        layer = modules.get(self.at)
        if not isinstance(layer, nn.Linear):
            linears = [path for path, module in modules.items() if isinstance(module, nn.Linear)]
            raise UserError(f"updates.*.adaptive.at: '{self.at}' is not a Linear layer. {did_you_mean(self.at, linears)}")
        layer.register_forward_hook(self._remember)
        self._layer = layer

    def check(self, update: str, parts: Iterable[nn.Module]) -> None:
        """Refuse a layer inside of a graph, where its output cannot be held, and one that tensor parallelism has cut: each rank
        would see a part of its gradient."""
        units = (unit for part in parts for unit in part.modules() if is_compiled(unit))
        if any(module is self._layer for unit in units for module in unit.modules()):
            raise UserError(
                f"updates.{update}.adaptive.at: '{self.at}' lies in a compiled unit. Name a layer of a head, or set "
                "parallel.compile: false."
            )
        weight = self._layer.weight
        if not isinstance(weight, DTensor):
            return
        names = weight.device_mesh.mesh_dim_names or ()
        if "tp" in names and not weight.placements[names.index("tp")].is_replicate():
            raise UserError(
                f"updates.{update}.adaptive.at: '{self.at}' is cut by tensor parallelism. "
                "Name a layer that is whole, or set parallel.tp: 1."
            )

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._input, self._output = inputs[0].detach(), output

    def weight(self, terms: Mapping[str, Tensor], mesh: Mesh) -> Tensor:
        assert self._input is not None and self._output is not None
        at = self._input, self._output  # a backward pass through a checkpointed unit runs the layer, and its hook, again
        reference = torch.stack([terms[name] for name in self.against]).sum()
        reference_norm, norm = self._norm(reference, *at, mesh), self._norm(terms[self.term], *at, mesh)
        return (reference_norm / (norm + 1e-6)).clamp(0.0, self.maximum).detach()

    @staticmethod
    def _norm(value: Tensor, x: Tensor, y: Tensor, mesh: Mesh) -> Tensor:
        """Of the gradient of ``value`` at the layer's weight, ``y`` being the layer's output for ``x``."""
        if not value.requires_grad:
            return torch.zeros_like(value)
        (out,) = torch.autograd.grad(value, y, retain_graph=True, allow_unused=True)
        if out is None:
            return torch.zeros_like(value)
        wide = torch.promote_types(x.dtype, torch.float32)
        return mesh.sum(out.flatten(0, -2).to(wide).mT @ x.flatten(0, -2).to(wide)).norm()


def plan_updates(cfg: Any, parts: Mapping[str, MetaModel], losses: Mapping[str, Loss]) -> list[Update]:
    """The updates of a run (RunConfig) over its model's parts and its losses; every loss belongs to exactly one."""
    updates: list[Update] = []
    owner: dict[str, str] = {}
    for name, update in (cfg.updates or {"main": UpdateConfig()}).items():
        for part in update.parts or ():
            if part not in parts:
                raise UserError(f"updates.{name}.parts: no part '{part}' in model. {did_you_mean(part, parts)}")
        for term in update.terms or losses:
            if term in owner:
                raise UserError(
                    f"updates: the term '{term}' is in '{owner[term]}' and in '{name}'; give each update its own `terms`."
                )
            owner[term] = name
        chosen = {part: parts[part] for part in update.parts or parts}
        for part in update.inference:
            if part not in chosen:
                raise UserError(f"updates.{name}.inference: '{part}' is none of its parts. {did_you_mean(part, chosen)}")
        terms = {term: losses[term] for term in update.terms or losses}
        if all(loss.weight is None for loss in terms.values()):
            raise UserError(f"updates.{name}: none of its terms has a weight, so it would train nothing.")
        first = min(loss.start for loss in terms.values() if loss.weight is not None)
        if first > update.start:
            raise UserError(
                f"updates.{name} runs from step {update.start}, but its first term with a weight starts at {first}: give the "
                "update that `start`."
            )
        made = Update(name, chosen, terms, update.params or ["*"], update.settings(cfg.optim), update.start, update.every)
        made.precision = cfg.parallel.precision
        made.inference = tuple(update.inference)
        if update.adaptive:
            made.adaptive = _adaptive(name, update.adaptive, terms)
            made.adaptive.attach(chosen)
        updates.append(made)
    for name in losses:
        if name not in owner:
            raise UserError(f"loss.{name} is in no update's terms.")
    return updates


def _adaptive(update: str, config: Any, terms: Mapping[str, Loss]) -> AdaptiveWeight:
    against = [config.against] if isinstance(config.against, str) else list(config.against)
    for term in (config.term, *against):
        if term not in terms:
            raise UserError(f"updates.{update}.adaptive: no term '{term}'. {did_you_mean(term, terms)}")
        if terms[term].weight is None:
            raise UserError(f"updates.{update}.adaptive: '{term}' is a metric (weight: null), and has no gradient.")
        if terms[term].start > terms[config.term].start:
            raise UserError(
                f"updates.{update}.adaptive: '{config.term}' is weighed against '{term}', which begins later (step "
                f"{terms[term].start} and {terms[config.term].start}). Let it begin first."
            )
    return AdaptiveWeight(config.term, against, config.at, config.max)


def assign_parameters(updates: Sequence[Update], trainable: Mapping[str, nn.Parameter]) -> None:
    """Give each update its parameters; every trainable one belongs to exactly one update.

    Raises:
        UserError: a pattern that matches nothing, or a parameter in two updates or in none.
    """
    owner: dict[str, str] = {}
    for update in updates:
        names = matching(update.patterns, trainable, f"updates.{update.name}.params")
        for name in names:
            if name in owner:
                raise UserError(f"'{name}' is in the updates '{owner[name]}' and '{update.name}'; make `params` disjoint.")
            owner[name] = update.name
        update.parameters = {name: trainable[name] for name in names}
    for name in trainable:
        if name not in owner:
            raise UserError(f"'{name}' is in no update. Add it to an update's `params`, or freeze it with l3m_like.core.Frozen.")


def add_source_metrics(updates: Sequence[Update], keys: Mapping[str, str]) -> None:
    """Add, as metrics, the terms of each source of a mixture (``{source: its mask's key}``): ``<term>/<source>``."""
    for update in updates:
        found = {f"{name}/{source}": loss.over(key) for name, loss in update.losses.items() for source, key in keys.items()}
        update.losses = {**update.losses, **{name: metric for name, metric in found.items() if metric is not None}}


def refuse_state(losses: Mapping[str, Loss]) -> None:
    """Losses own no weights: they would be neither sharded, trained nor saved."""
    for name, loss in losses.items():
        owned = (*loss.named_parameters(), *loss.named_buffers(), *vars(loss).items())
        held = [path for path, value in owned if isinstance(value, Tensor)]
        if held:
            raise UserError(
                f"loss.{name} holds the tensor '{held[0]}'. A loss owns none: put a network into the model, as a Frozen block "
                "that writes what the loss reads, and make constants in compute."
            )


def refuse_untied(parts: Mapping[str, MetaModel]) -> None:
    """Parameters that blocks have in common are one tensor; apart, each would be trained by itself."""
    for part in parts.values():
        held = Counter(id(parameter) for _, parameter in part.named_parameters(remove_duplicate=False))
        for path, block in part.blocks():
            for name, whose in block.shared.items():
                if held[id(block.get_parameter(name))] == 1:
                    raise UserError(
                        f"{path}.{name} ({type(block).__name__}) is to be another block's as well, and would be trained by "
                        f"itself. Name both in `tie`: {{{path}.{name}: {whose}}}."
                    )


def refuse_gaps(updates: Sequence[Update], carried: Mapping[str, Sequence[str]]) -> None:
    """Refuse updates that leave a step without any, or read what an update wrote that does not run in the same step."""
    if not any(update.start == 0 and update.every == 1 for update in updates):
        raise UserError("updates: none of them runs at every step; one must have `start: 0` and `every: 1`.")
    for number, update in enumerate(updates):
        for key in carried[update.name]:
            writer = next(u for u in reversed(updates[:number]) if key in u.keep)
            if writer.start > update.start or update.every % writer.every or (update.start - writer.start) % writer.every:
                raise UserError(
                    f"updates.{update.name} reads '{key}' of updates.{writer.name}, which does not run at all of its steps. "
                    "Give the two the same `start` and `every`."
                )


def refuse_split(updates: Sequence[Update], accumulation: int, pipeline: int) -> None:
    """Refuse what cannot be split into micro-batches where there would be several (a metric's late count just adds up)."""
    if accumulation == 1 and pipeline == 1:
        return
    fix = "Raise batch.micro so that one micro-batch holds the rank's rows."
    for update in updates:
        for name, loss in update.losses.items():
            if (loss.count_late and loss.weight is not None) or (loss.scope == "batch" and (pipeline > 1 or not loss.splits)):
                why = "counts in the forward (count_late)" if loss.count_late else "is no sum over elements (scope: batch)"
                raise UserError(f"loss.{name} {why}, so it refuses {accumulation} micro-batches per step. {fix}")
        if update.adaptive is not None:
            raise UserError(
                f"updates.{update.name}.adaptive needs the gradient of the whole batch, not {accumulation} micro-batches. {fix}"
            )
