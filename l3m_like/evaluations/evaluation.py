"""What an entry ``evals.NAME.run`` builds: an object that looks at the live model, and says what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from l3m_like.core.errors import UserError
from l3m_like.distributed.mesh import Mesh


@dataclass(frozen=True)
class Findings:
    """What an evaluation found; equal on every rank (images: those of rank 0 are shown).

    Attributes:
        values: numbers, logged as ``NAME/KEY``.
        images: pictures for people, uint8 [H, W, 1 or 3], or the path of a PNG; logged as ``NAME/KEY``.
        notes: what must be known to compare the values (an extractor, random weights); written beside them and into the report.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    images: Mapping[str, Tensor | Path] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if both := sorted(set(self.values) & set(self.notes)):
            raise UserError(f"Findings: '{both[0]}' is a value and a note: one would replace the other. Rename the note.")


class Evaluation(Protocol):
    """Called by training at its ``every`` and at the end. An entry with ``data`` gets the dataset as the argument ``data``; one
    that takes a ``sampler`` (default None) gets that of the run, unless its entry gives another.

    It may also define ``check(model)``, called before training with the model as it is built: it raises a UserError where the
    model or a file does not fit.
    """

    def evaluate(self, model: nn.Module, *, mesh: Mesh, step: int, seed: int, folder: Path) -> Findings:
        """Evaluate ``model`` as it is now.

        Every rank calls it, with the model in evaluation mode and without gradients. It must not draw from torch's global
        generators, and what it finds must not depend on the number of processes.

        Args:
            model: a MetaModel or Series on ``mesh``, sharded or not, with the averaged weights if the run has them.
            mesh: of the run; its data-parallel ranks share the work.
            step: steps taken.
            seed: of the run.
            folder: for files of its own (made by whoever writes first, on ``mesh.is_main``).
        """
        ...
