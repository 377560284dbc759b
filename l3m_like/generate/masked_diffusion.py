"""Text from masks: block after block, several tokens at a time (LLaDA, arXiv:2502.09992, section 2.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.random import uniform_at
from l3m_like.distributed.mesh import Mesh
from l3m_like.generate.autoregressive import Texts, draw, probabilities
from l3m_like.generate.sampler import Inference, collect, deal, sampling

REMASKING = ("low_confidence", "entropy", "random")


class MaskedDiffusion:
    """Generate text by unmasking: a prompt is followed by masks, which become tokens block by block, from left to right.

    In each of a block's ``steps`` the model predicts all its masks. Each prediction is a draw from the distribution of its
    place; the surest ones stay, an equal share in every step, and the others are masks again.

    Supplies   <into>_noised, <into>_positions [B, S] int64; <into>_document_ids [B, S] int32 (-1 = padding, on the left);
               where a block reads it, <into>_stages [B, S] int64: the model is one of block diffusion, with this ``block``;
               <stream>_places [P] int64, those whose logits are needed
    Takes      <stream>_logits [B, P, V]

    A token is a function of (seed, row, position, step, logits): it does not depend on the batch it is computed in, on the
    padding or on the mesh. Row ``i * num_samples + j`` is the j-th continuation of prompt i.

    Args:
        prompts: texts, or lists of token ids; they may be empty, unless ``shift`` or ``guidance`` asks for a prompt.
        max_new_tokens: per prompt: the number of masks.
        mask_id: the mask token.
        block: tokens per block; None: all new tokens are one. Of block diffusion the block that it was trained with, counted
            from the beginning of the document.
        steps: per block; None: as many as it has tokens.
        remasking: what is surest: "low_confidence" (the drawn token has a high probability), "entropy" (the distribution has a
            low one) or "random" (the order is drawn, as in the process that the model was trained to invert).
        threshold: in every step also keep all tokens with more probability than this; a block that is full is left early.
        temperature: divides the logits of what is drawn; 0 takes the likeliest token. (A draw from softmax(logits / T) is the
            arg max of logits + T * Gumbel noise.)
        top_k, top_p: as of ``Autoregressive``.
        guidance: w of classifier-free guidance, logits = null + (w + 1) (conditional - null), where "null" has masks for a
            prompt (LLaDA, appendix A.2). 0: none; else every step computes twice the rows.
        never: ids that are never generated (an end token, to go on to the last mask).
        cache: keep keys and values of finished blocks (block diffusion alone, where they no longer change).
        shift: the output at place i predicts the token at i + 1, as of ``MaskTokens``.
        num_samples: continuations per prompt.
        end: a continuation ends at the tokenizer's end-of-document token.
        batch: rows computed at a time, per rank.
        seed: of the draws.
        stream: of the head.
        into: of what the model reads, if that is another (see ``CleanCopy``).

    Raises:
        UserError: settings out of range; a model or tokenizer that does not fit.
    """

    def __init__(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int,
        mask_id: int,
        *,
        block: int | None = None,
        steps: int | None = None,
        remasking: str = "low_confidence",
        threshold: float | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 0.0,
        never: Sequence[int] = (),
        cache: bool = True,
        shift: bool = False,
        num_samples: int = 1,
        end: bool = True,
        batch: int = 64,
        seed: int = 0,
        stream: str = "text",
        into: str | None = None,
    ) -> None:
        if isinstance(prompts, str) or not prompts:
            raise UserError(f"MaskedDiffusion: prompts is {prompts!r}; it is a list, e.g. prompts: ['ROMEO:'].")
        numbers = {"max_new_tokens": max_new_tokens, "block": block, "steps": steps, "top_k": top_k}
        for name, value in (numbers | {"num_samples": num_samples, "batch": batch}).items():
            if value is not None and value < 1:
                raise UserError(f"MaskedDiffusion: {name} is {value}; it is at least 1.")
        if remasking not in REMASKING:
            raise UserError(f"MaskedDiffusion: no remasking '{remasking}'. {did_you_mean(remasking, REMASKING)}")
        if threshold is not None and (remasking != "low_confidence" or not 0 < threshold <= 1):
            raise UserError(
                f"MaskedDiffusion: threshold is {threshold} with remasking {remasking}; it is a probability above 0, "
                "and goes with low_confidence."
            )
        if temperature < 0:
            raise UserError(f"MaskedDiffusion: temperature is {temperature}; 0 takes the likeliest token, 1 draws by the model.")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"MaskedDiffusion: top_p is {top_p}; it is a probability above 0 and at most 1.")
        if guidance < 0:
            raise UserError(f"MaskedDiffusion: guidance is {guidance}; 0 is the plain model, 0.5 to 2 are usual.")
        self.prompts = list(prompts)
        self.max_new_tokens = max_new_tokens
        self.mask_id = mask_id
        self.block = block
        self.steps = steps
        self.remasking = remasking
        self.threshold = threshold
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.guidance = guidance
        self.never = [mask_id, *never]
        self.cache = cache
        self.shift = shift
        self.num_samples = num_samples
        self.end = end
        self.batch = batch
        self.seed = seed
        self.stream = stream
        self.into = stream if into is None else into

    def run(self, model: nn.Module, *, process: Any = None, mesh: Mesh | None = None) -> Texts:
        """Generate from ``model`` as it is now; see ``Sampler.run``. ``process`` needs ``encode``, ``decode`` and ``end_id``."""
        if process is not None and not all(hasattr(type(process), name) for name in ("encode", "decode", "end_id")):
            process = None
        prompts = [self._encode(prompt, process) for prompt in self.prompts]
        end = process.end_id if self.end and process is not None else None
        found: dict[int, list[int]] = {}
        with sampling(model, eager=True) as graph:
            staged = self.check(graph)
            layout = Layout(prompts, self.max_new_tokens, self.block, staged)
            for rows, count in deal(len(prompts) * self.num_samples, self.batch, mesh):
                ids = self._generate(graph, layout, rows, end, count, mesh)
                tokens = [layout.new(row // self.num_samples, line) for row, line in zip(rows, ids.tolist(), strict=True)]
                found |= dict(zip(rows, tokens, strict=True)) if count else {}
        tokens = [row[: row.index(end)] if end in row else row for row in collect(found, mesh)]
        texts = [prompt for prompt in prompts for _ in range(self.num_samples)]
        decode = (lambda row: None) if process is None else process.decode
        return Texts([decode(row) for row in texts], [decode(row) for row in tokens], tokens)

    def _encode(self, prompt: str | Sequence[int], process: Any) -> list[int]:
        if isinstance(prompt, str) and process is None:
            raise UserError(
                f"MaskedDiffusion: the prompt {prompt!r} is a text, but there is no tokenizer: data.train.process has no encode "
                "and decode. Give lists of token ids."
            )
        ids = process.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        for name, value in (("shift", self.shift), ("guidance", self.guidance)):
            if value and not ids:
                raise UserError(f"MaskedDiffusion: the prompt {prompt!r} has no token, and {name}: {value} needs one.")
        return ids

    def check(self, graph: Inference) -> bool:
        """Raise a UserError unless the model reads what this sampler supplies and writes what it takes; is it block diffusion?"""
        keys = {port: f"{self.into}_{port}" for port in ("noised", "positions", "document_ids", "stages")}
        reading = [block for _, block in graph.blocks if keys["stages"] in block.reads.values()]
        staged = any(getattr(block, "mask", None) == "staged" for block in reading)
        if staged and self.block is None:
            raise UserError("MaskedDiffusion: the model's mask is 'staged' (block diffusion); give the `block` of its training.")
        if staged and self.shift:
            raise UserError("MaskedDiffusion: shift and block diffusion do not go together: a block does not see its last token.")
        supplied = [*keys.values(), f"{self.stream}_places"]
        graph.check("MaskedDiffusion", supplied, [keys["noised"], keys["document_ids"]], f"{self.stream}_logits")
        return staged

    def _generate(
        self, graph: Inference, layout: Layout, rows: Sequence[int], end: int | None, count: bool, mesh: Mesh | None
    ) -> Tensor:
        """The rows [B, S], without a mask left. Every rank computes as many steps as the rank that needs most."""
        ids, positions, documents = (
            x.to(graph.device) for x in layout.canvas([row // self.num_samples for row in rows], self.mask_id)
        )
        row = torch.tensor(rows, device=graph.device)
        fixed = ids != self.mask_id
        predict = (_Cached if layout.staged and self.cache else _Whole)(self, graph, layout, positions, documents, fixed)
        number = 0
        for window in layout.windows():
            steps = self.steps or window.stop - window.start
            for step in range(steps):
                logits = predict(ids, window)
                at = (row.unsqueeze(1), positions[:, window], number)
                ids[:, window] = self._unmask(ids[:, window], logits, at, steps - step)
                number += 1
                if mesh is not None and mesh.size("tp") > 1:
                    # their logits may differ in the last bit, and two histories of one row must not part
                    dist.broadcast(ids, group_src=0, group=mesh["tp"].get_group())
                if self.threshold is not None and _nobody(ids[:, window] == self.mask_id, count, mesh):
                    number += steps - step - 1
                    break
            predict.finish(ids, window)
            if end is not None and _nobody(((ids == end) & ~fixed).sum(1) == 0, count, mesh):
                break  # every row has ended
        return ids

    def _unmask(self, ids: Tensor, logits: Tensor, at: tuple[Tensor, Tensor, int], left: int) -> Tensor:
        """``ids`` [B, W] with the surest of their masks filled by ``logits`` [B, W, V]: so many that ``left`` equal steps are
        enough. ``at``: row [B, 1], position [B, W], number of the step."""
        row, position, number = at
        masked = ids == self.mask_id
        logits = logits.double().index_fill(-1, torch.tensor(self.never, device=logits.device), float("-inf"))
        element = position + (number << 32)
        if self.temperature == 0:
            token = logits.argmax(-1)
        else:
            uniform, drawn_from = uniform_at(self.seed, f"masked_diffusion/{self.stream}", row, element), logits
            if logits.is_cuda and torch.are_deterministic_algorithms_enabled():
                # the sum along the vocabulary has no deterministic kernel there
                uniform, drawn_from = uniform.cpu(), logits.cpu()
            chances = probabilities(drawn_from.flatten(0, 1), self.temperature, self.top_k, self.top_p)
            token = draw(chances, uniform.flatten()).view(ids.shape).to(ids.device)
        if self.remasking == "random":
            sure = uniform_at(self.seed, f"masked_diffusion/{self.stream}/order", row, element)
        else:
            scores = logits.log_softmax(-1)
            sure = scores.gather(-1, token.unsqueeze(-1)).squeeze(-1).exp()
            if self.remasking == "entropy":
                sure = (scores.exp() * scores.clamp(min=-1e300)).sum(-1)  # 0 where the probability is 0
        number_of = masked.sum(1, keepdim=True)
        share = -(-number_of // left)
        if self.threshold is not None:
            share = torch.maximum(share, (masked & (sure > self.threshold)).sum(1, keepdim=True))
        order = sure.masked_fill(~masked, float("-inf")).argsort(dim=1, descending=True, stable=True)
        return torch.where(masked & (order.argsort(dim=1) < share), token, ids)


class Layout:
    """Where prompts and masks stand in rows of one length, so that all rows have the same windows.

    Rows are padded on the left. A window is a block of new tokens; of block diffusion a block of the document, so that the
    first one may begin with the end of the prompt.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], new: int, block: int | None, staged: bool) -> None:
        self.prompts, self.count, self.staged = prompts, new, staged
        self.block = new if block is None else block
        #: what of each prompt stands before the first window
        self.before = [len(prompt) // self.block * self.block if staged else len(prompt) for prompt in prompts]
        self.start = max(self.before)
        self.stop = self.start + max(len(p) - n for p, n in zip(prompts, self.before, strict=True)) + new

    def windows(self) -> list[slice]:
        return [slice(at, min(at + self.block, self.stop)) for at in range(self.start, self.stop, self.block)]

    def first(self, number: int) -> int:
        """The place of the first new token of prompt ``number``."""
        return self.start - self.before[number] + len(self.prompts[number])

    def new(self, number: int, line: Sequence[int]) -> list[int]:
        """The new tokens in a row of prompt ``number``."""
        return list(line[self.first(number) : self.first(number) + self.count])

    def canvas(self, numbers: Sequence[int], mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
        """ids and positions int64, document ids int32, each [B, S], of the prompts ``numbers`` and their masks."""
        ids = torch.zeros(len(numbers), self.stop, dtype=torch.int64)
        documents = torch.full(ids.shape, -1, dtype=torch.int32)
        positions = torch.zeros_like(ids)
        for line, number in enumerate(numbers):
            prompt, first = self.prompts[number], self.first(number)
            begin, stop = first - len(prompt), first + self.count
            ids[line, begin:first] = torch.tensor(prompt, dtype=torch.int64)
            ids[line, first:stop] = mask_id
            documents[line, begin:stop] = 0
            positions[line, begin:stop] = torch.arange(stop - begin)
        return ids, positions, documents


class _Whole:
    """Logits of a window from the whole rows (of block diffusion: up to the window's end, which is all that it sees)."""

    def __init__(
        self, sampler: MaskedDiffusion, graph: Inference, layout: Layout, positions: Tensor, documents: Tensor, fixed: Tensor
    ) -> None:
        self.sampler, self.graph, self.layout, self.fixed = sampler, graph, layout, fixed
        self.positions, self.documents = positions, documents
        self.caches: dict[str, Any] = {}

    def __call__(self, ids: Tensor, window: slice) -> Tensor:
        seen = slice(0, window.stop if self.layout.staged else ids.shape[1])
        back = int(self.sampler.shift)
        return self.logits(ids, seen, window.start, slice(window.start - back, window.stop - back))

    def finish(self, ids: Tensor, window: slice) -> None:
        """``window`` has no mask left."""

    def logits(self, ids: Tensor, seen: slice, clean: int, wanted: slice) -> Tensor:
        """Logits of the places ``wanted`` among those that are ``seen``, of which those before ``clean`` are clean; guided."""
        guided = self.sampler.guidance > 0
        keys: dict[str, Tensor] = {"noised": ids, "positions": self.positions, "document_ids": self.documents}
        if self.layout.staged:
            place = torch.arange(ids.shape[1], device=ids.device)
            keys["stages"] = 2 * (self.positions // self.layout.block) + (place < clean)
        if guided:
            keys = {name: torch.cat((value, value)) for name, value in keys.items()}
            keys["noised"][len(ids) :][self.fixed] = self.sampler.mask_id
        data = {f"{self.sampler.into}_{name}": value[:, seen] for name, value in keys.items()} | self.caches
        first, key = seen.start or 0, f"{self.sampler.stream}_places"
        data[key] = torch.arange(wanted.start - first, wanted.stop - first, device=ids.device)
        logits = self.graph(data)[f"{self.sampler.stream}_logits"]
        if not self.graph.reads(key):
            logits = logits.index_select(1, data[key])
        if not guided:
            return logits
        conditional, null = logits.to(torch.promote_types(logits.dtype, torch.float32)).chunk(2)
        return null + (self.sampler.guidance + 1) * (conditional - null)


class _Cached(_Whole):
    """The same for block diffusion with keys and values of finished blocks: a step computes one window."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        rows = len(self.positions) * (2 if self.sampler.guidance > 0 else 1)
        self.caches = {
            block.reads["cache"]: block.make_cache(rows, self.layout.stop, self.graph.device) for _, block in self.graph.cached
        }
        self.prompt = slice(0, self.layout.start)

    def __call__(self, ids: Tensor, window: slice) -> Tensor:
        self._keep_prompt(ids)
        logits = self.logits(ids, window, window.start, window)
        for cache in self.caches.values():
            cache.truncate(window.start)  # the window is not finished
        return logits

    def finish(self, ids: Tensor, window: slice) -> None:
        if window.stop < self.layout.stop:
            self._keep(ids, window)

    def _keep_prompt(self, ids: Tensor) -> None:
        if self.prompt.stop:
            self._keep(ids, self.prompt)
            self.prompt = slice(0, 0)

    def _keep(self, ids: Tensor, window: slice) -> None:
        """Keep keys and values of clean tokens; nobody asks for their logits."""
        self.logits(ids, window, window.stop, slice(window.stop - 1, window.stop))


def _nobody(left: Tensor, count: bool, mesh: Mesh | None) -> bool:
    """Whether ``left`` is false everywhere, on all ranks (rows that do not count aside)."""
    number = (left & count).sum()
    return int(number if mesh is None else mesh.sum(number)) == 0
