"""The base of losses and metrics.

A loss gives a *sum* over this rank's rows and a *count*, its denominator. The loop sums both over micro-batches and ranks,
so that splitting a batch differently changes nothing: loss = sum over terms of weight * (global sum) / (global count).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from l3m_like.core.block import Data, ReadWriteBlock
from l3m_like.core.errors import UserError


class Loss(ReadWriteBlock):
    """A loss term (or, without a weight, a metric).

    A subclass defines ``compute(ports) -> scalar sum`` in at least float32, and ``count(ports) -> scalar``, whose parameters
    name ports that the *loader* writes (they follow the same rule as those of ``compute``: ``reads``, else the stream).

    Args:
        weight: of the term in the total loss; None makes it a metric.
        start: step (from 0) at which the term begins; before, what only it reads is not computed. Evaluations always have it.
        ports: reads, stream of ``ReadWriteBlock``.
    """

    outputs = ("sum",)
    #: the count is known only in the forward: ``compute`` returns (sum, count), and ``count`` is not called
    count_late: bool = False
    #: "element": a sum over elements; "batch": no such sum (contrastive losses); ``compute`` gathers by itself
    scope: str = "element"

    def __init__(
        self, weight: float | None = 1.0, *, start: int = 0, reads: Mapping[str, str] | None = None, **ports: Any
    ) -> None:
        name = type(self).__name__
        if start < 0:
            raise UserError(f"{name}: start is {start}; it is the number of a step, from 0.")
        if weight is not None and not math.isfinite(weight):
            raise UserError(f"{name}: weight must be a finite number or null (a metric), got {weight}.")
        if not self.count_late and type(self).count is Loss.count:
            raise UserError(f"{name} defines neither count(...) nor count_late = True.")
        if self.scope not in ("element", "batch"):
            raise UserError(f"{name}.scope must be 'element' or 'batch', got '{self.scope}'.")
        reads = dict(reads or {})
        self._count_ports = () if self.count_late else tuple(inspect.signature(self.count).parameters)
        # what only `count` reads is no port of the forward
        only_count = {port: reads.pop(port) for port in self._count_ports if port in reads and port not in self.read_ports()}
        super().__init__(reads=reads, **ports)
        self._only_count = only_count
        self.weight = weight
        self.start = start

    def count(self, *args: Any, **kwargs: Any) -> Tensor:
        """The denominator (int64 scalar), from keys of the loader alone."""
        raise UserError(f"{type(self).__name__} has count_late: its count comes from compute.")

    @property
    def count_reads(self) -> dict[str, str]:
        """``{port: key}`` of ``count``, every default filled in; optional ports only where ``reads`` names them."""
        named = self._reads | self._only_count
        parameters = inspect.signature(self.count).parameters
        asked = [port for port in self._count_ports if port in named or parameters[port].default is not None]
        return {port: named.get(port) or self.key(port) for port in asked}

    def count_of(self, data: Data) -> Tensor:
        """``count`` on the keys of ``data``, a micro-batch from the loader."""
        return self.count(**{port: data[key] for port, key in self.count_reads.items()})

    def shown(self, mean: float) -> float:
        """What an evaluation shows for the mean over all elements; a metric may be a function of it."""
        return mean

    def over(self, key: str) -> Loss | None:
        """This term where the mask ``key`` is true, as a metric; None for a loss without a (free) port ``only``."""
        if "only" not in self.ports or "only" in self._reads or self.count_late:
            return None
        metric = copy.copy(self)
        metric._reads = self._reads | {"only": key}
        metric.weight = None
        return metric

    def term(self, data: Data, total: float | None, mesh: Any = None) -> tuple[Tensor, Tensor | float]:
        """``(sum over this rank's rows, denominator)``: ``total`` if it was known before, else the late count.

        A late count is summed over the rows of ``mesh``, and at least 1; with None it stays this rank's own.
        """
        out = self.compute(**{port: data[key] for port, key in self.reads.items() if key in data})
        if not self.count_late:
            assert total is not None
            return out, total
        value, count = out
        # detached and copied: the mesh sums in place
        return value, count.detach() if mesh is None else mesh.sum(count.detach().clone()).clamp(min=1)
