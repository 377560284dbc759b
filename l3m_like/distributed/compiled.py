"""``torch.compile`` per repeating unit, and how many graphs that has made.

Equal units (one class, parameters of the same shapes) share their graphs: a model has one for training and one for evaluation,
whatever its depth. What makes more of them (a shape that changes, a number that is baked in) costs a compilation each time, so
graphs are counted, named, and limited.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from l3m_like.core.errors import UserError

log = logging.getLogger(__name__)

BACKEND = "inductor"

#: graphs that come later than this many steps after the start are reported as recompilations
SETTLED = 3

#: of torch, per function; beyond it a function is eager from then on, without a word
TORCH_LIMIT = 64


def is_compiled(unit: nn.Module) -> bool:
    """Whether ``Graphs`` has compiled ``unit`` (not one below it)."""
    return hasattr(unit.forward, "is_compiled")


class Graphs:
    """Compiles units, and counts the graphs of each kind of unit: ``training`` (with gradients) and ``evaluation``.

    Args:
        limit: graphs per kind of unit and mode; one more is a UserError that names the guard that failed. None: no limit.
        backend: of ``torch.compile``: a name or a callable.
    """

    def __init__(self, limit: int | None = 4, backend: Any = None) -> None:
        self.limit, self.backend = limit, backend or BACKEND
        #: ``{kind of unit: {mode: graphs}}``
        self.counts: dict[str, dict[str, int]] = {}
        #: recompilations after the first steps
        self.late = 0
        self.steps = 0
        self._kinds: dict[Any, Counted] = {}
        self._told: Any = None
        self._failures: dict[Any, int] = {}

    def compile(self, units: Sequence[nn.Module]) -> None:
        """Compile ``forward`` of each unit (checkpointing is inside of it; the hooks of FSDP, which come later, are not)."""
        import torch._dynamo

        # ours is reached first. Units of several kinds share a function where they are checkpointed
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, TORCH_LIMIT)
        for unit in units:
            shapes = tuple((name, tuple(p.shape)) for name, p in unit.named_parameters())
            key = type(unit), shapes, hasattr(unit.forward, "__self__")
            if key not in self._kinds:
                same = sum(other[0] is type(unit) for other in self._kinds)
                name = type(unit).__name__ + (f" ({same + 1})" if same else "")
                self._kinds[key] = Counted(name, self.backend)
                self.counts[name] = {"training": 0, "evaluation": 0}
            unit.forward = self._counted(unit.forward, self._kinds[key])  # type: ignore[method-assign]

    def _counted(self, forward: Callable[..., Any], kind: Counted) -> Callable[..., Any]:
        # a shape that changes makes a new graph, which is counted. With torch's default it would make a graph of symbolic
        # shapes instead, slower for every later step; shapes here are those of full rows, and do not change
        compiled = torch.compile(forward, backend=kind, dynamic=False)

        def counted(*args: Any, **kwargs: Any) -> Any:
            before = kind.made
            out = compiled(*args, **kwargs)
            if kind.made != before:
                self._note(kind, kind.made - before)
            return out

        counted.is_compiled = True  # type: ignore[attr-defined]
        return counted

    def _note(self, kind: Counted, made: int) -> None:
        mode = "training" if torch.is_grad_enabled() else "evaluation"
        counts = self.counts[kind.name]
        again = counts[mode] > 0
        counts[mode] += made
        why = self._failed_guards()
        if not again:
            if made > 1:
                log.warning("%s was compiled in %d pieces, with Python between them: %s", kind.name, made, self._breaks())
            return
        if self.steps >= SETTLED:
            self.late += made
            log.warning("%s was compiled again for %s (graph %d): %s", kind.name, mode, counts[mode], why)
        if self.limit is not None and counts[mode] > self.limit:
            raise UserError(
                f"{kind.name} has {counts[mode]} graphs for {mode}, and parallel.compile_limit is {self.limit}. It was compiled "
                f"again because of: {why}. Keep that constant, raise parallel.compile_limit (null: no limit), or set "
                "parallel.compile: false."
            )

    def _failed_guards(self) -> str:
        """Why the newest graph was made although there were others."""
        from torch._dynamo.utils import guard_failures

        found = [reason for code, reasons in guard_failures.items() for reason in reasons[self._failures.get(code, 0) :]]
        self._failures = {code: len(reasons) for code, reasons in guard_failures.items()}
        # what separates training from evaluation, or kinds of units, is no news
        news = [reason.strip() for reason in found if "grad_mode" not in reason and "backend" not in reason.lower()]
        return "; ".join(dict.fromkeys(news)) or "a reason that torch does not name (TORCH_LOGS=recompiles may)"

    @staticmethod
    def _breaks() -> str:
        """Why graphs are in pieces: the first line of each of torch's reasons."""
        from torch._dynamo.utils import counters

        return "; ".join(
            dict.fromkeys(line for reason in counters["graph_break"] for line in str(reason).strip().splitlines()[:1])
        )

    def after_step(self) -> None:
        self.steps += 1

    def news(self) -> dict[str, Any]:
        """For metrics.jsonl: ``graphs`` and ``recompiles`` if they have changed since the last call, else nothing."""
        now = {"graphs": {name: dict(counts) for name, counts in self.counts.items()}, "recompiles": self.late}
        if not self.counts or now == self._told:
            return {}
        self._told = now
        return now

    def __str__(self) -> str:
        """ "TransformerLayer 1 + 1 for evaluation, none after step 3"."""
        kinds = [
            f"{name} {counts['training']}" + (f" + {counts['evaluation']} for evaluation" if counts["evaluation"] else "")
            for name, counts in self.counts.items()
        ]
        return f"{', '.join(kinds)}, {self.late or 'none'} recompiled after step {SETTLED}"


class Counted:
    """A backend that counts the graphs it is given. One per kind of unit: torch keeps the graphs of different backends apart."""

    def __init__(self, name: str, backend: Any) -> None:
        self.name, self.backend, self.made = name, backend, 0

    def __call__(self, module: Any, inputs: Any) -> Any:
        import torch._dynamo

        self.made += 1
        backend = torch._dynamo.lookup_backend(self.backend) if isinstance(self.backend, str) else self.backend
        return backend(module, inputs)
