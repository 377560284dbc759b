"""Text, one token after the other."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from l3m_like.core.errors import UserError
from l3m_like.core.random import uniform_at
from l3m_like.distributed.compiled import Graphs
from l3m_like.distributed.mesh import Mesh
from l3m_like.generate.sampler import Inference, collect, deal, forwards, sampling

#: a cache's length is a multiple of this, so that prompts of other lengths meet the same graphs
_LENGTH = 64


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
               a key/value cache for every block that makes one; of a prompt, <stream>_places [1] int64: the last place is
               the only one whose logits are needed
    Takes      <stream>_logits [B, S or 1, V]

    A token is a function of (seed, row, position, logits): it does not depend on the batch it is computed in, on the padding or
    on the mesh. Row ``i * num_samples + j`` is the j-th continuation of prompt i.

    The prompts of a batch run at once; then every token is one step of fixed shapes over the whole cache, in which nothing waits
    for the device.

    Args:
        prompts: texts, or lists of token ids.
        max_new_tokens: per prompt.
        temperature: divides the logits, above 0.
        top_p: draw from the smallest set of tokens that has this much probability (Holtzman et al., arXiv:1904.09751).
        top_k: draw from the k likeliest tokens (applied before ``top_p``).
        min_p: draw from tokens at least this fraction as likely as the likeliest (arXiv:2407.01082; applied after ``top_p``).
        greedy: always take the likeliest token.
        cache: keep keys and values, so that a step computes one token per row instead of all.
        num_samples: continuations per prompt.
        end: stop a row at the tokenizer's end-of-document token.
        stop: stop a row when its continuation contains one of these texts, which are cut off.
        batch: rows computed at a time, per rank.
        compile: compile the repeating units for the steps (not for the prompts) and, on one GPU, record a step as a CUDA graph.
            The first step then takes as long as a compilation does; later runs of the same sampler have it already.
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
        min_p: float | None = None,
        greedy: bool = False,
        cache: bool = True,
        num_samples: int = 1,
        end: bool = True,
        stop: Sequence[str] = (),
        batch: int = 64,
        compile: bool = False,
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
        if min_p is not None and not 0 <= min_p <= 1:
            raise UserError(f"Autoregressive: min_p is {min_p}; it is a fraction of the largest probability, 0 to 1.")
        if compile and not cache:
            raise UserError("Autoregressive: compile needs cache: true; without a cache every step has another shape.")
        self.prompts = list(prompts)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.min_p = min_p
        self.greedy = greedy
        self.cache = cache
        self.num_samples = num_samples
        self.end = end
        self.stop = list(stop)
        self.batch = batch
        self.graphs = Graphs(limit=None) if compile else None
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
                own = [prompts[row // self.num_samples] for row in rows]
                endings = Endings(len(rows) if count else 0, self._end(process), self.stop, process)
                tokens = self._generate(graph, own, rows, endings, mesh)
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

    def _end(self, process: Any) -> int | None:
        return process.end_id if self.end and process is not None else None

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
        supplied = [self._key(port) for port in ("ids", "positions", "document_ids", "places")]
        graph.check("Autoregressive", supplied, [self._key("ids"), self._key("document_ids")], self._key("logits"))

    def _generate(
        self,
        graph: Inference,
        prompts: Sequence[list[int]],
        rows: Sequence[int],
        endings: Endings,
        mesh: Mesh | None,
    ) -> list[list[int]]:
        """The new tokens of each row. Every rank runs as many steps as the rank that needs most."""
        longest = max(map(len, prompts))
        total = longest + self.max_new_tokens
        padding = torch.tensor([longest - len(prompt) for prompt in prompts]).view(-1, 1)
        ids = torch.zeros(len(prompts), total, dtype=torch.int64)
        for number, prompt in enumerate(prompts):
            ids[number, longest - len(prompt) : longest] = torch.tensor(prompt)
        place = torch.arange(total).expand_as(ids)
        keys = {"ids": ids, "positions": (place - padding).clamp(min=0)}
        if bool(padding.any()) or graph.requires(self._key("document_ids")):  # without padding, attention has a simpler mask
            keys["document_ids"] = torch.where(place < padding, -1, 0).to(torch.int32)
        keys = {port: value.to(graph.device) for port, value in keys.items()}
        ids, positions, row = keys["ids"], keys["positions"], torch.tensor(rows, device=graph.device)
        cached = graph.cached if self.cache else []
        room = -(-total // _LENGTH) * _LENGTH
        caches = {block.reads["cache"]: block.make_cache(len(prompts), room, graph.device) for _, block in cached}
        following = torch.tensor([longest], device=graph.device)  # the place of the token that is drawn next

        def draw_from(seen: Callable[[Tensor], Tensor]) -> None:
            """Draw a token from the logits behind what is ``seen`` of the keys' columns."""
            data = {self._key(port): seen(value) for port, value in keys.items()}
            if (length := data[self._key("ids")].shape[1]) > 1:
                data[self._key("places")] = torch.full((1,), length - 1, device=graph.device)
            data = graph(data | caches)
            token = self._draw(data[self._key("logits")][:, -1], row, positions.index_select(1, following).squeeze(1))
            if mesh is not None and mesh.size("tp") > 1:
                # their logits may differ in the last bit, and two histories of one row must not part
                dist.broadcast(token, group_src=0, group=mesh["tp"].get_group())
            ids.index_copy_(1, following, token.unsqueeze(1))
            following.add_(1)

        def step() -> None:
            draw_from(lambda value: value.index_select(1, following - 1))

        alone = graph.device.type == "cuda" and (mesh is None or mesh.world_size == 1)
        recorded = self.graphs is not None and alone and not torch.are_deterministic_algorithms_enabled()
        look = look_every(graph.device)
        run: Callable[[], None] = step
        seen = 0
        with ExitStack() as stack:
            for new in range(1, self.max_new_tokens + 1):
                if new == 1 or not self.cache:
                    draw_from(itemgetter((slice(None), slice(longest + new - 1))))
                else:
                    if new == 2:
                        stack.enter_context(forwards(graph.units, self.graphs))
                    if new == 3 and recorded:  # the second token's step has made all that is made once
                        run = record(step)
                    run()
                if endings.possible and (new % look == 0 or new == self.max_new_tokens):
                    left = endings.left(ids[:, longest + seen : longest + new].tolist())
                    seen = new
                    if (left if mesh is None else int(mesh.sum(torch.tensor(left, device=graph.device)))) == 0:
                        break
        return [endings.cut(tokens) for tokens in ids[:, longest : longest + new].tolist()]

    def _draw(self, logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """Next tokens [B] for logits [B, V] of ``row`` [B], to stand at ``position`` [B]."""
        if self.greedy:
            return logits.argmax(-1)
        uniform = uniform_at(self.seed, f"generate/{self.stream}", row, position)
        if logits.is_cuda and torch.are_deterministic_algorithms_enabled():
            logits, uniform = logits.cpu(), uniform.cpu()  # the sum along the vocabulary has no deterministic kernel there
        return draw(probabilities(logits, self.temperature, self.top_k, self.top_p, self.min_p), uniform).to(row.device)


class Endings:
    """Which rows have ended, told from their new tokens as these reach the host, and where.

    Args:
        rows: how many there are (0: this rank has none that count).
        end: the token that ends a row, or None.
        stop: texts that end a row.
        process: decodes tokens, for ``stop``.
    """

    def __init__(self, rows: int, end: int | None, stop: Sequence[str], process: Any) -> None:
        self.end, self.stop, self.process = end, stop, process
        #: whether a row can end before its last token
        self.possible = end is not None or bool(stop)
        self.running = set(range(rows))
        # a token is a byte at least; a text that begins within a token, or within a character, begins in the part before
        self.margin = max((len(text.encode()) for text in stop), default=0) + 8
        self.tails: list[list[int]] = [[] for _ in range(rows)]

    def left(self, new: Sequence[Sequence[int]]) -> int:
        """Rows that go on after these ``new`` tokens of all rows."""
        for row in sorted(self.running):
            tail = self.tails[row] + list(new[row])
            self.tails[row] = tail[-self.margin :]
            if self.end in new[row] or (self.stop and self._stops(tail)):
                self.running.remove(row)
        return len(self.running)

    def cut(self, tokens: list[int]) -> list[int]:
        """A row's tokens to its own end: others of its batch may have gone on longer."""
        tokens = tokens[: tokens.index(self.end)] if self.end in tokens else tokens
        if not self.stop or not self._stops(tokens):
            return tokens
        return tokens[: bisect.bisect_left(range(len(tokens)), True, key=lambda length: self._stops(tokens[:length]))]

    def _stops(self, tokens: Sequence[int]) -> bool:
        text = self.process.decode(tokens)
        return any(stop in text for stop in self.stop)


def look_every(device: torch.device) -> int:
    """Tokens between two looks at what has ended: a look makes the host wait for an accelerator."""
    return 1 if device.type == "cpu" else 16


def record(step: Callable[[], None]) -> Callable[[], None]:
    """``step`` as a CUDA graph: what it reads and writes stays where it is, and a call is one launch."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """What tokens are drawn from, [..., V] float64: temperature, top-k, top-p, min-p, in this order; one token is always left."""
    scores = logits.double() / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[..., -1:], float("-inf"))
    chances = scores.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = chances.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # the probability of all likelier ones
        kept = ordered.masked_fill((before >= top_p) & (order != order[..., :1]), 0.0)
        chances = torch.zeros_like(chances).scatter(-1, order, kept)
    if min_p:
        chances = chances.masked_fill(chances < min_p * chances.amax(-1, keepdim=True), 0.0)
    return chances / chances.sum(-1, keepdim=True)


def draw(chances: Tensor, uniform: Tensor) -> Tensor:
    """The tokens [B] at which the running sum of ``chances`` [B, V] passes ``uniform`` [B] (in (0, 1))."""
    running = chances.cumsum(-1)
    wanted = (uniform * running[:, -1]).unsqueeze(-1)
    return torch.searchsorted(running, wanted, right=True).squeeze(-1).clamp(max=chances.shape[-1] - 1)
