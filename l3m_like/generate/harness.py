"""A loaded model for lm-evaluation-harness (``lm_eval``, https://github.com/EleutherAI/lm-evaluation-harness)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from l3m_like.core.errors import UserError
from l3m_like.data.processors.multiple_choice import continuation
from l3m_like.distributed.mesh import Mesh
from l3m_like.generate.autoregressive import Autoregressive
from l3m_like.generate.sampler import Inference, collect, deal, sampling

#: (tokens that are given, tokens whose likelihood is asked)
Pair = tuple[Sequence[int], Sequence[int]]

#: tokens whose logits exist at a time: 300 MB of bfloat16 for a vocabulary of 150,000, and twice that of float32
_TOKENS = 1024


class Harness:
    """Likelihoods and continuations of texts, as the harness asks for them: a request has ``args``.

    Every rank of a mesh is asked the same, computes its share, and answers all.

    Args:
        model: a MetaModel or Series that writes ``<stream>_logits`` at inference.
        process: encodes and decodes text: ``encode``, ``decode``, ``end_id`` and ``tokenizer``, as ``l3m_like.data.Tokenize``.
        max_length: tokens of a window; a longer text loses its beginning.
        batch: windows computed at a time, per rank.
        mesh: that the model is on.
        stream: of the language model's blocks.
    """

    def __init__(
        self, model: nn.Module, process: Any, *, max_length: int, batch: int = 8, mesh: Mesh | None = None, stream: str = "text"
    ) -> None:
        if not hasattr(process, "tokenizer"):
            raise UserError(
                "the harness asks in text: data.train.process must be a processor with a tokenizer, such as Tokenize."
            )
        if max_length < 2 or batch < 1:
            raise UserError(f"harness: max_length is {max_length} and batch {batch}; they are at least 2 and 1.")
        self.model, self.process, self.max_length, self.batch, self.mesh = model, process, max_length, batch, mesh
        self.stream = stream

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of requests (context, text): the logarithm of the text's probability, and whether it is what greedy decoding gives."""
        pairs = [continuation(self.process.tokenizer, *request.args) for request in requests]
        return self.score([(given.tolist(), new.tolist()) for given, new in pairs])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of requests (text,): the logarithm of its probability behind the end token, see ``windows``."""
        windows = [self.windows(self.process.encode(request.args[0])) for request in requests]
        scores = iter(self.score([window for text in windows for window in text]))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def windows(self, tokens: Sequence[int]) -> list[Pair]:
        """Every token asked once, in windows of ``max_length`` inputs; the last one reaches back to have as many."""
        whole = [self.process.end_id, *tokens]
        pairs: list[Pair] = []
        for done in range(0, len(tokens), self.max_length):
            stop = min(done + self.max_length, len(tokens))
            pairs.append((whole[max(0, stop - self.max_length) : done + 1], whole[done + 1 : stop + 1]))
        return pairs

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Of requests (context, settings): the continuation, cut before the first text of ``until``."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        texts: dict[int, str] = {}
        for numbers in groups.values():
            settings = requests[numbers[0]].args[1]
            found = self._texts([requests[number].args[0] for number in numbers], settings)
            texts |= dict(zip(numbers, found, strict=True))
        return [texts[number] for number in range(len(requests))]

    def _texts(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        new = int(settings.get("max_gen_toks", settings.get("max_new_tokens", 256)))
        until = settings.get("until") or []
        kept = self.max_length - new
        if kept < 1:
            raise UserError(
                f"a task asks for {new} new tokens, and max_length is {self.max_length}: no token of a prompt is left. Raise "
                "--max-length, or lower the task's max_gen_toks."
            )
        prompts = [(self.process.encode(context) or [self.process.end_id])[-kept:] for context in contexts]
        drawn = bool(settings.get("do_sample")) and float(settings.get("temperature", 1.0)) > 0
        sampler = Autoregressive(
            prompts,
            new,
            greedy=not drawn,
            cache=bool(Inference(self.model).cached),
            stop=[until] if isinstance(until, str) else list(until),
            batch=self.batch,
            stream=self.stream,
            **(
                {name: settings[name] for name in ("temperature", "top_p", "top_k", "min_p") if name in settings} if drawn else {}
            ),
        )
        return [text or "" for text in sampler.run(self.model, process=self.process, mesh=self.mesh).texts]

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """``(log-probability, is greedy)`` of the asked tokens of each pair."""
        order = sorted(range(len(pairs)), key=lambda number: -len(pairs[number][0]) - len(pairs[number][1]))  # alike together
        found: dict[int, tuple[float, bool]] = {}
        with sampling(self.model, eager=True) as graph:
            supplied = [self._key(port) for port in ("ids", "positions", "document_ids", "places")]
            graph.check("harness", supplied, supplied[:1], self._key("logits"))
            for places, counts in deal(len(pairs), self.batch, self.mesh) if pairs else ():
                numbers = [order[place] for place in places]
                scores = self._scores(graph, [pairs[number] for number in numbers])
                found |= dict(zip(numbers, scores, strict=True)) if counts else {}
        return collect(found, self.mesh)

    def _key(self, port: str) -> str:
        return f"{self.stream}_{port}"

    def _scores(self, graph: Inference, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        rows = [[*given, *new][-(self.max_length + 1) :] for given, new in pairs]
        longest = max(len(row) for row in rows) - 1
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        targets, documents = torch.full_like(ids, -1), torch.full_like(ids, -1, dtype=torch.int32)
        for number, (row, (_, new)) in enumerate(zip(rows, pairs, strict=True)):
            ids[number, : len(row) - 1] = torch.tensor(row[:-1])
            documents[number, : len(row) - 1] = 0
            asked = min(len(new), len(row) - 1)
            targets[number, len(row) - 1 - asked : len(row) - 1] = torch.tensor(row[len(row) - asked :])
        data = {"ids": ids, "positions": torch.arange(longest).expand_as(ids).contiguous(), "document_ids": documents}
        asked_of = (targets >= 0).any(0).nonzero().squeeze(1).to(graph.device)
        targets = targets.to(graph.device)
        body, head = graph.around(self._key("logits"))
        out = body({self._key(port): value.to(graph.device) for port, value in data.items()})
        # A head runs for some tokens at a time. It runs once where it is the whole model, where it gives all logits at any rate,
        # and where it gathers weights of its own, for which every rank must call it equally often
        once = head.units or head.gathers or not head.reads(self._key("places"))
        chunk = max(1, len(asked_of) if once else _TOKENS // len(rows))
        sums = torch.zeros(len(rows), dtype=torch.float64, device=graph.device)
        greedy = torch.ones(len(rows), dtype=torch.bool, device=graph.device)
        for places in asked_of.split(chunk):
            logits = head(out | {self._key("places"): places})[self._key("logits")]
            if not head.reads(self._key("places")):
                logits = logits.index_select(1, places)
            wanted = targets.index_select(1, places)
            asked_here = wanted >= 0
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            chosen = scores.gather(-1, wanted.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            sums += torch.where(asked_here, chosen, 0).sum(1, dtype=torch.float64)
            greedy &= ((logits.argmax(-1) == wanted) | ~asked_here).all(1)
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))


def harness_model(*args: Any, **settings: Any) -> Any:
    """A ``Harness`` that is an ``lm_eval.api.model.LM``; arguments as ``Harness``.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UserError("lm-evaluation-harness is not installed (pip install lm_eval).") from error

    class Model(Harness, LM):
        def __init__(self) -> None:
            LM.__init__(self)
            Harness.__init__(self, *args, **settings)

    return Model()
