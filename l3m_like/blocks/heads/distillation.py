"""Heads of a teacher and of the student that it teaches (knowledge distillation, Hinton et al., arXiv:1503.02531)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from l3m_like.blocks.heads.language_model import LanguageModelHead
from l3m_like.core.errors import UserError
from l3m_like.kernels.linear_distillation import (
    Divergence,
    linear_distillation,
    linear_distillation_top_k,
    linear_top_k,
)
from l3m_like.layers.vocabulary import whole


class TeacherHead(LanguageModelHead):
    """The head of a frozen language model that teaches another: its parameters are those of ``LanguageModelHead``.

    Reads   hidden [B, S, Dt]
    Writes  teacher_features [B, S, Dt] after the final norm and teacher_vocabulary [V, Dt], of whose product its logits are
            made, chunk by chunk, where the student's are; or, with `top_k`, teacher_logprobs [B, S, k] float32 and teacher_ids
            [B, S, k] int64 of its k likeliest tokens

    Args:
        vocab_size: V, that of the student.
        dim: Dt.
        norm_eps: of the final norm.
        top_k: k. None: the whole distribution.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs: tuple[str, ...] = ("teacher_features", "teacher_vocabulary", "teacher_logprobs", "teacher_ids")
    optional_outputs = ()
    inference_outputs = None

    def __init__(self, vocab_size: int, dim: int, norm_eps: float = 1e-6, top_k: int | None = None, **ports: Any) -> None:
        if top_k is not None and not 0 < top_k < vocab_size:
            raise UserError(f"TeacherHead: top_k = {top_k}; it is below vocab_size ({vocab_size}). null: the whole distribution.")
        self.outputs = type(self).outputs[:2] if top_k is None else type(self).outputs[2:]
        super().__init__(vocab_size, dim, norm_eps, **ports)
        self.top_k = top_k

    def compute(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        weight = whole(self.proj.weight)
        hidden = self.normed(hidden)
        if self.top_k is not None:
            return linear_top_k(hidden, weight, self.top_k)
        # a copy: FSDP frees the gathered matrix when the teacher's forward is over, before the student's head reads it
        return hidden, weight.detach().clone()

    def flops(self, hidden: Tensor) -> int:  # type: ignore[override]
        """Its logits are counted here, wherever they are computed: they have no backward pass."""
        return super().flops(hidden)


class DistillationHead(LanguageModelHead):
    """A ``LanguageModelHead`` that also compares its distribution with a teacher's, at every token that has a target.

    Reads   hidden [B, S, D]; targets [B, S] int64; places as ``LanguageModelHead``; what ``TeacherHead`` writes (needed for
            divergence)
    Writes  as ``LanguageModelHead``; divergence [B, S] at least float32, 0 where there is no target

    Args:
        vocab_size: V.
        dim: D.
        norm_eps: of the final norm.
        divergence: "forward_kl" (of the student from the teacher), "reverse_kl" or "jensen_shannon"; see
            ``kernels/linear_distillation.py``.
        beta: of "jensen_shannon": the teacher's weight in the middle.
        temperature: of both distributions; the divergence is multiplied by its square.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("logits", "nll", "divergence")
    optional_outputs = ("logits", "nll", "divergence")

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        norm_eps: float = 1e-6,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        **ports: Any,
    ) -> None:
        super().__init__(vocab_size, dim, norm_eps, **ports)
        self.divergence = Divergence(divergence, beta, temperature)

    def compute(  # type: ignore[override]
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        teacher_features: Tensor | None = None,
        teacher_vocabulary: Tensor | None = None,
        teacher_logprobs: Tensor | None = None,
        teacher_ids: Tensor | None = None,
        places: Tensor | None = None,
        *,
        outputs: Sequence[str],
    ) -> dict[str, Tensor]:
        out = super().compute(hidden, targets, places=places, outputs=outputs)
        if "divergence" not in outputs:
            return out
        weight = whole(self.proj.weight)
        hidden = self.normed(hidden)
        if targets is None:
            raise UserError(f"DistillationHead writes divergence, which needs the key '{self.reads['targets']}'.")
        if teacher_features is not None and teacher_vocabulary is not None:
            if len(teacher_vocabulary) != len(weight):
                raise UserError(
                    f"the teacher's vocabulary has {len(teacher_vocabulary)} tokens, the student's {len(weight)}. Distillation "
                    "compares them token by token: both need the same tokenizer, and vocabularies padded to the same size."
                )
            teacher = teacher_features, teacher_vocabulary
            out["divergence"] = linear_distillation(hidden, weight, *teacher, targets, self.divergence)
        elif teacher_logprobs is not None and teacher_ids is not None:
            out["divergence"] = linear_distillation_top_k(hidden, weight, teacher_logprobs, teacher_ids, targets, self.divergence)
        else:
            keys = ", ".join(f"'{self.reads[port]}'" for port in ("teacher_features", "teacher_vocabulary"))
            raise UserError(f"DistillationHead writes divergence, which needs the keys {keys}: a Frozen part with a TeacherHead.")
        return out

    def flops(  # type: ignore[override]
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        teacher_features: Tensor | None = None,
        teacher_vocabulary: Tensor | None = None,
        teacher_logprobs: Tensor | None = None,
        teacher_ids: Tensor | None = None,
        places: Tensor | None = None,
    ) -> int:
        """Its logits once for each of nll and divergence."""
        return super().flops(hidden, targets) * sum(port in self.writes for port in ("nll", "divergence"))
