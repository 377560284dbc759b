"""Text, one token after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from l3m_like.core.errors import UserError
from l3m_like.core.random import uniform_at
from l3m_like.distributed.mesh import Mesh
from l3m_like.generate.sampler import Inference, collect, deal, sampling


@dataclass(frozen=True)
class Texts:
    """Continuations: ``prompts[i]`` goes on with ``texts[i]``, whose tokens are ``tokens[i]`` (without the end token).

    Texts are None where there was no tokenizer.
    """

    prompts: list[str | None]
    texts: list[str | None]
    tokens: list[list[int]]
    suffix: str = ".txt"

    def __str__(self) -> str:
        rows = [
            f"{prompt}{text}" if text is not None else " ".join(map(str, tokens))
            for prompt, text, tokens in zip(self.prompts, self.texts, self.tokens, strict=True)
        ]
        return f"\n{'-' * 40}\n".join(rows)

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{self}\n", encoding="utf-8")
        return path


class Autoregressive:
    """Generate text token by token.

    Supplies   <stream>_ids, <stream>_positions [B, S] int64; <stream>_document_ids [B, S] int32 (-1 = padding, on the left);
               a key/value cache for every block that makes one
    Takes      <stream>_logits [B, S, V]

    A token is a function of (seed, row, position, logits): it does not depend on the batch it is computed in, on the padding or
    on the mesh. Row ``i * num_samples + j`` is the j-th continuation of prompt i.

    Args:
        prompts: texts, or lists of token ids.
        max_new_tokens: per prompt.
        temperature: divides the logits, above 0.
        top_p: draw from the smallest set of tokens that has this much probability (Holtzman et al., arXiv:1904.09751).
        top_k: draw from the k likeliest tokens (applied before ``top_p``).
        greedy: always take the likeliest token.
        cache: keep keys and values, so that a step computes one token per row instead of all.
        num_samples: continuations per prompt.
        end: stop a row at the tokenizer's end-of-document token.
        stop: stop a row when its continuation contains one of these texts, which are cut off.
        batch: rows computed at a time, per rank.
        seed: of the draws.
        stream: of the language model's blocks.

    Raises:
        UserError: settings out of range; a model or tokenizer that does not fit.
    """

    def __init__(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        greedy: bool = False,
        cache: bool = True,
        num_samples: int = 1,
        end: bool = True,
        stop: Sequence[str] = (),
        batch: int = 64,
        seed: int = 0,
        stream: str = "text",
    ) -> None:
        if isinstance(prompts, str) or not prompts:
            raise UserError(f"Autoregressive: prompts is {prompts!r}; it is a list, e.g. prompts: ['ROMEO:'].")
        if isinstance(stop, str):
            raise UserError(f"Autoregressive: stop is {stop!r}; it is a list, e.g. stop: [{stop!r}].")
        for name, value in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples), ("batch", batch)):
            if value < 1:
                raise UserError(f"Autoregressive: {name} is {value}; it is at least 1.")
        if not temperature > 0:
            raise UserError(f"Autoregressive: temperature is {temperature}; it is above 0 (the likeliest token: greedy: true).")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"Autoregressive: top_p is {top_p}; it is a probability above 0 and at most 1.")
        if top_k is not None and top_k < 1:
            raise UserError(f"Autoregressive: top_k is {top_k}; it is at least 1.")
        self.prompts = list(prompts)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.greedy = greedy
        self.cache = cache
        self.num_samples = num_samples
        self.end = end
        self.stop = list(stop)
        self.batch = batch
        self.seed = seed
        self.stream = stream

    def run(self, model: nn.Module, *, process: Any = None, mesh: Mesh | None = None) -> Texts:
        """Generate from ``model`` as it is now; see ``Sampler.run``. ``process`` needs ``encode``, ``decode`` and ``end_id``."""
        if process is not None and not all(hasattr(type(process), name) for name in ("encode", "decode", "end_id")):
            process = None
        prompts = [self._encode(prompt, process) for prompt in self.prompts]
        if self.stop and process is None:
            raise UserError("Autoregressive: stop needs a tokenizer: a data.train.process with encode and decode.")
        found: dict[int, list[int]] = {}
        with sampling(model, eager=True) as graph:
            self.check(graph)
            for rows, count in deal(len(prompts) * self.num_samples, self.batch, mesh):
                tokens = self._generate(graph, [prompts[row // self.num_samples] for row in rows], rows, count, process, mesh)
                found |= dict(zip(rows, tokens, strict=True)) if count else {}
        tokens = collect(found, mesh)
        given = [self._text(prompt, process, cut=False) for prompt in prompts for _ in range(self.num_samples)]
        return Texts(given, [self._text(row, process) for row in tokens], tokens)

    def _encode(self, prompt: str | Sequence[int], process: Any) -> list[int]:
        if isinstance(prompt, str) and process is None:
            raise UserError(
                f"Autoregressive: the prompt {prompt!r} is a text, but there is no tokenizer: data.train.process has no encode "
                "and decode. Give lists of token ids."
            )
        ids = process.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids:
            raise UserError(f"Autoregressive: the prompt {prompt!r} has no token; the first token needs one before it.")
        return ids

    def _text(self, tokens: Sequence[int], process: Any, cut: bool = True) -> str | None:
        if process is None:
            return None
        text = process.decode(tokens)
        for stop in self.stop if cut else ():
            text = text.partition(stop)[0]
        return text

    def _key(self, port: str) -> str:
        return f"{self.stream}_{port}"

    def check(self, graph: Inference) -> None:
        """Raise a UserError unless the model reads what this sampler supplies and writes what it takes."""
        caches = [(path, block.reads["cache"]) for path, block in graph.cached]
        if self.cache and not caches:
            raise UserError("Autoregressive: no block of this model makes a key/value cache; say cache: false.")
        for number, (path, key) in enumerate(caches):
            if key in [other for _, other in caches[:number]]:
                raise UserError(
                    f"Autoregressive: {path} shares the cache '{key}' with another block; give it `reads: {{cache: {key}_2}}`."
                )
        supplied = [self._key(port) for port in ("ids", "positions", "document_ids")]
        graph.check("Autoregressive", supplied, [self._key("ids"), self._key("document_ids")], self._key("logits"))

    def _generate(
        self, graph: Inference, prompts: Sequence[list[int]], rows: Sequence[int], count: bool, process: Any, mesh: Mesh | None
    ) -> list[list[int]]:
        """The new tokens of each row. Every rank runs as many steps as the rank that needs most."""
        longest = max(map(len, prompts))
        total = longest + self.max_new_tokens
        padding = torch.tensor([longest - len(prompt) for prompt in prompts]).view(-1, 1)
        ids = torch.zeros(len(prompts), total, dtype=torch.int64)
        for number, prompt in enumerate(prompts):
            ids[number, longest - len(prompt) : longest] = torch.tensor(prompt)
        place = torch.arange(total).expand_as(ids)
        documents = torch.where(place < padding, -1, 0).to(torch.int32).to(graph.device)
        positions = (place - padding).clamp(min=0).to(graph.device)
        ids, row = ids.to(graph.device), torch.tensor(rows, device=graph.device)
        cached = graph.cached if self.cache else []
        caches = {block.reads["cache"]: block.make_cache(len(prompts), total, graph.device) for _, block in cached}
        end = process.end_id if self.end and process is not None else None
        finished = torch.full((len(prompts),), not count, device=graph.device)
        start = 0
        for now in range(longest, total):
            keys = {"ids": ids, "positions": positions, "document_ids": documents}
            data = graph({self._key(port): value[:, start:now] for port, value in keys.items()} | caches)
            token = self._draw(data[self._key("logits")][:, -1], row, positions[:, now])
            if mesh is not None and mesh.size("tp") > 1:
                # their logits may differ in the last bit, and two histories of one row must not part
                dist.broadcast(token, group_src=0, group=mesh["tp"].get_group())
            ids[:, now] = token
            start = now if self.cache else 0
            if end is None and not self.stop:
                continue  # nothing ends early: no reason to wait for the device
            finished |= token == (-1 if end is None else end)
            for number in range(len(prompts)) if self.stop else ():
                text = process.decode(ids[number, longest : now + 1].tolist())
                finished[number] |= any(stop in text for stop in self.stop)
            left = (~finished).sum()
            if int(left if mesh is None else mesh.sum(left)) == 0:
                break
        return [self._until_end(new, end, process) for new in ids[:, longest : now + 1].tolist()]

    def _until_end(self, tokens: list[int], end: int | None, process: Any) -> list[int]:
        """A row's tokens to its own end: others in its batch may have gone on longer."""
        tokens = tokens[: tokens.index(end)] if end in tokens else tokens
        for length in range(1, len(tokens) + 1) if self.stop else ():
            text = process.decode(tokens[:length])
            if any(stop in text for stop in self.stop):
                return tokens[:length]
        return tokens

    def _draw(self, logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """Next tokens [B] for logits [B, V] of ``row`` [B], to stand at ``position`` [B]."""
        if self.greedy:
            return logits.argmax(-1)
        uniform = uniform_at(self.seed, f"generate/{self.stream}", row, position)
        if logits.is_cuda and torch.are_deterministic_algorithms_enabled():
            logits, uniform = logits.cpu(), uniform.cpu()  # the sum along the vocabulary has no deterministic kernel there
        return draw(probabilities(logits, self.temperature, self.top_k, self.top_p), uniform).to(row.device)


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """What tokens are drawn from: [..., V] float64, in that order temperature, top-k, top-p; at least one token is left."""
    scores = logits.double() / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[..., -1:], float("-inf"))
    chances = scores.softmax(-1)
    if top_p is None or top_p >= 1:
        return chances
    ordered, order = chances.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # the probability of all likelier ones
    kept = ordered.masked_fill((before >= top_p) & (order != order[..., :1]), 0.0)
    chances = torch.zeros_like(chances).scatter(-1, order, kept)
    return chances / chances.sum(-1, keepdim=True)


def draw(chances: Tensor, uniform: Tensor) -> Tensor:
    """The tokens [B] at which the running sum of ``chances`` [B, V] passes ``uniform`` [B] (in (0, 1))."""
    running = chances.cumsum(-1)
    wanted = (uniform * running[:, -1]).unsqueeze(-1)
    return torch.searchsorted(running, wanted, right=True).squeeze(-1).clamp(max=chances.shape[-1] - 1)
