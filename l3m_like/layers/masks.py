"""Attention masks: a description, the choice of a backend that is exact for it, and its lowering to that backend's form.

The *kind* and the window are static layer config, the tensors are keys of the data. A trunk lowers the mask once per forward
and distinct (backend, window) of its layers. Masks are bool, True = may attend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.kernels.attention import BORDERS, FUSED, LoweredMask, cudnn_takes, flash_attn_4_wins, short_takes
from l3m_like.kernels.linear_cross_entropy import IGNORE

KINDS = ("full", "causal", "prefix", "staged")


@dataclass(frozen=True)
class AttentionMask:
    """Who may attend to whom; every condition that is given must hold.

    Args:
        kind: "full"; "causal" (keys up to the query's place); "prefix" (causal, and the first ``prefix_lengths`` places of
            a row see each other); "staged" (by ``stages``: keys of the query's own stage, and of earlier odd ones).
        document_ids: int [B, Sq], the document of every query; only keys of the same document are seen. Negative = padding:
            attends to nothing and is seen by nothing (what a backend writes there is unspecified, and finite).
        kv_document_ids: int [B, Skv] (None: ``document_ids``).
        prefix_lengths: int [B], for kind "prefix".
        stages: int [B, Sq], for kind "staged": 2b for a noisy token of a document's block b, 2b + 1 for a clean one. So noisy
            tokens see their own block and the clean ones of earlier blocks; clean tokens see clean ones up to their block (block
            diffusion, arXiv:2503.09573, section 3.2).
        query_start: place of the first query in the row of keys (tokens already in a key/value cache); an int64 scalar on the
            device where no host number may be part of the graph: places behind the last query are then not written yet.
        cu_seqlens: int32 [N + 1], the borders of the same documents over B*S, padding between borders of its own; what the
            backends for packed rows want.
        window: a query sees keys less than this many places away (causal: the last ``window`` keys, its own included).
    """

    kind: str = "full"
    document_ids: Tensor | None = None
    kv_document_ids: Tensor | None = None
    prefix_lengths: Tensor | None = None
    query_start: int | Tensor = 0
    cu_seqlens: Tensor | None = None
    window: int | None = None
    stages: Tensor | None = None

    def __post_init__(self) -> None:
        check_kind(self.kind)
        for kind, name, shape in (("prefix", "prefix_lengths", "[B]"), ("staged", "stages", "[B, S]")):
            value = getattr(self, name)
            if (self.kind == kind) != (value is not None):
                raise UserError(
                    f"mask '{self.kind}' with{'out' if value is None else ''} {name}: "
                    f"give {name} {shape} for the kind '{kind}', and only for it."
                )
        if self.stages is not None and (self.window is not None or self.query_start):
            raise UserError("mask 'staged': its keys are no sequence of places, so it takes neither a window nor a cache.")
        if self.window is not None and self.window < 1:
            raise UserError(f"mask: the window is {self.window}; it is a number of keys, at least 1.")


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise UserError(f"no attention mask '{kind}'. {did_you_mean(kind, KINDS)}")


def choose_backend(
    asked: str,
    mask: AttentionMask,
    query_length: int,
    kv_length: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    grouped: bool = False,
    flash_attn_4: bool = False,
) -> str:
    """The backend for ``mask``: the one that was asked for, or for "auto" the fastest that is exact.

    ``grouped``: query heads share key heads. ``flash_attn_4``: the package is there, and faster if rows are causal. Measured on
    Hopper (docs/benchmarks.md): for short rows without a mask cuDNN with a backward pass of ours ("short"), else cuDNN (or, if it
    is faster, FlashAttention-4) where neither documents, windows nor prefixes are masked, else FlexAttention (FlashAttention-2
    over document borders takes longer, the longer the list of borders that few documents fill). Elsewhere (CPU, fp32, a key/value
    cache) SDPA.

    Raises:
        UserError: the backend that was asked for cannot do this mask exactly, with what can.
    """
    square = _begins(mask) and query_length == kv_length and mask.kv_document_ids is None
    half = dtype in (torch.float16, torch.bfloat16)
    by_place = mask.kind in ("full", "causal")
    plain = by_place and square and mask.window is None and mask.document_ids is None
    bordered = by_place and square and (mask.document_ids is None or mask.cu_seqlens is not None)
    if asked == "auto":
        if device.type != "cuda" or not half or not square:
            return "sdpa"
        if plain:
            if mask.kind == "full" and short_takes(query_length, head_dim, grouped, device):
                return "short"
            if torch.are_deterministic_algorithms_enabled() or not cudnn_takes(head_dim, device):  # its backward pass is not
                return "flash" if head_dim <= 256 else "sdpa"
            return "flash_attn" if mask.kind == "causal" and flash_attn_4 else "cudnn"
        return "flex" if 16 <= head_dim <= 256 else "sdpa"
    problem = None
    meta = device.type == "meta"  # shapes alone: the device and the dtype are not yet those of the run
    if asked == "flex" and device.type == "cpu" and torch.is_grad_enabled():
        problem = "its backward pass needs CUDA"
    elif asked in FUSED and not meta and not (half and device.type == "cuda"):
        problem = f"it takes fp16 and bf16 on CUDA, not {dtype} on {device.type}"
    elif asked in FUSED and not square:
        problem = "it takes no key/value cache"
    elif asked == "short" and mask.kind != "full":
        problem = "it masks nothing"
    elif asked == "short" and not meta and not (plain and short_takes(query_length, head_dim, grouped, device)):
        problem = "it takes full attention of 65 to 256 places with heads of 64 or 72, each with its own keys, on Hopper"
    elif asked in ("flash", "cudnn") and not plain:
        problem = "it masks neither documents, windows, prefixes nor stages"
    elif asked in BORDERS and not bordered:
        problem = "it masks documents by their borders (cu_seqlens), and neither prefixes nor stages"
    if problem:
        raise UserError(f"attention backend {asked}: {problem}. Use 'auto', which picks one that is exact for the mask.")
    return "sdpa" if meta and asked != "reference" else asked


def _begins(mask: AttentionMask) -> bool:
    """Whether the queries are known to begin where the keys do."""
    return isinstance(mask.query_start, int) and mask.query_start == 0


def lower(
    mask: AttentionMask,
    backend: str,
    batch: int,
    query_length: int,
    kv_length: int,
    device: torch.device,
    *,
    half: bool = False,
) -> LoweredMask:
    """Lower ``mask`` for ``backend`` (of ``choose_backend``; "sdpa" uses its own causal rule where that is enough).

    ``half``: computing in half precision, which matters on the meta device alone.
    """
    if backend == "flex":
        return LoweredMask(backend, blocks=_blocks(mask, batch, query_length, kv_length, device))
    causal = mask.kind == "causal"
    if device.type == "meta" and backend == "sdpa" and half:
        return LoweredMask(causal=causal and query_length == kv_length)  # no kernel for half precision holds a table of pairs
    if backend == "flash_attn" and mask.document_ids is None and mask.window is None:
        return LoweredMask(backend, causal=causal)
    if backend in BORDERS:
        borders = mask.cu_seqlens
        if borders is None or mask.document_ids is None:  # one document per row
            borders = torch.arange(0, batch * query_length + 1, query_length, dtype=torch.int32, device=device)
        # FlashAttention counts the keys beside the query's own
        left = -1 if mask.window is None else mask.window - 1
        return LoweredMask(backend, cu_seqlens=borders, max_seqlen=query_length, window=(left, 0 if causal else left))
    if backend in ("flash", "cudnn", "short"):
        return LoweredMask(backend, causal=causal)
    if backend == "sdpa" and mask.document_ids is None and (mask.window is None or mask.window >= kv_length):
        known = isinstance(mask.query_start, int)
        if known and (mask.kind == "full" or (causal and query_length == 1 and mask.query_start + 1 == kv_length)):
            return LoweredMask()
        if causal and _begins(mask) and query_length == kv_length:
            return LoweredMask(causal=True)
    return _dense(mask, backend, query_length, kv_length, device)


def _dense(mask: AttentionMask, backend: str, query_length: int, kv_length: int, device: torch.device) -> LoweredMask:
    query = (torch.arange(query_length, device=device) + mask.query_start).view(1, 1, -1, 1)
    key = torch.arange(kv_length, device=device).view(1, 1, 1, -1)
    allowed = torch.ones(1, 1, query_length, kv_length, dtype=torch.bool, device=device)
    if mask.kind in ("causal", "prefix"):
        allowed = key <= query
    if mask.stages is not None:
        allowed = _staged(mask.stages[:, None, :, None], mask.stages[:, None, None, :])
    if mask.prefix_lengths is not None:
        length = mask.prefix_lengths.view(-1, 1, 1, 1)
        allowed = allowed | ((query < length) & (key < length))
    if mask.window is not None:
        allowed = allowed & ((query - key).abs() < mask.window)
    if not isinstance(mask.query_start, int):
        allowed = allowed & (key < mask.query_start + query_length)
    if mask.document_ids is None:
        return LoweredMask(backend, allowed)
    query_document = mask.document_ids[:, None, :, None]
    kv_ids = mask.document_ids if mask.kv_document_ids is None else mask.kv_document_ids
    allowed = allowed & (query_document == kv_ids[:, None, None, :]) & (query_document >= 0)
    # softmax over nothing is NaN: a query without a key sees every key, and its output is set to zero afterwards
    live = allowed.any(-1, keepdim=True)
    return LoweredMask(backend, allowed | ~live, live=live.transpose(1, 2))


def _staged(query: Tensor, key: Tensor) -> Tensor:
    """The rule of the kind "staged" for stages that broadcast."""
    return (key == query) | ((key % 2 == 1) & (key < query))


def _blocks(mask: AttentionMask, batch: int, query_length: int, kv_length: int, device: torch.device) -> Any:
    """The same rules as ``_dense``, pair by pair, as a BlockMask of FlexAttention.

    Which blocks it visits follows from the smallest and largest document of each, so that no table of S x S pairs is made
    (FlexAttention's own ``create_block_mask`` makes one). A block that may hold a pair is visited; one is visited without
    looking at pairs if all of them are allowed.
    """
    from torch.nn.attention.flex_attention import BlockMask

    ids, prefix, window, start, stages = mask.document_ids, mask.prefix_lengths, mask.window, mask.query_start, mask.stages
    by_place = mask.kind in ("causal", "prefix")
    kv_ids = ids if mask.kv_document_ids is None else mask.kv_document_ids

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = query + start
        seen = key <= place if by_place else place >= 0
        if stages is not None:
            seen = _staged(stages[row, query], stages[row, key])
        if prefix is not None:
            seen = seen | ((place < prefix[row]) & (key < prefix[row]))
        if window is not None:
            seen = seen & ((place - key).abs() < window)
        if not isinstance(start, int):
            seen = seen & (key < start + query_length)
        if ids is not None and kv_ids is not None:
            seen = seen & (ids[row, query] == kv_ids[row, key]) & (ids[row, query] >= 0)
        return seen

    first_q = (torch.arange(0, query_length, _BLOCK, device=device) + start).view(1, -1, 1)
    first_k = torch.arange(0, kv_length, _BLOCK, device=device).view(1, 1, -1)
    last_q, last_k = first_q + _BLOCK - 1, first_k + _BLOCK - 1
    some = first_k <= last_q if by_place else first_q >= 0  # a pair may be allowed
    every = last_k <= first_q if by_place else first_q >= 0  # all are
    some, every = (x.expand(batch, first_q.shape[1], first_k.shape[2]) for x in (some, every))
    if stages is not None:
        low_q, high_q = _extremes(stages, 2)
        low_k, high_k = _extremes(stages, 1)
        all_clean, clean = _extremes(stages % 2, 1)
        some = some & (((low_q <= high_k) & (low_k <= high_q)) | ((clean == 1) & (low_k < high_q)))
        every = every & (((low_q == high_q) & (low_k == high_k) & (low_q == low_k)) | ((all_clean == 1) & (high_k <= low_q)))
    if prefix is not None:
        length = prefix.view(-1, 1, 1)
        some = some | ((first_q < length) & (first_k < length))
        every = every | ((last_q < length) & (last_k < length))
    if window is not None:
        some = some & (first_q - last_k < window) & (first_k - last_q < window)
        every = every & (last_q - first_k < window) & (last_k - first_q < window)
    if ids is not None and kv_ids is not None:
        low_q, high_q = _extremes(ids, 2)
        low_k, high_k = _extremes(kv_ids, 1)
        some = some & (high_q >= 0) & (low_q <= high_k) & (low_k <= high_q)
        every = every & (low_q == high_q) & (low_k == high_k) & (low_q == low_k) & (low_q >= 0)
    every = every & (last_q < start + query_length) & (last_k < kv_length)
    if not isinstance(start, int):
        every = every & (last_k < start + query_length)
    (few, few_at), (full, full_at) = (_listed(x) for x in (some & ~every, some & every))
    return BlockMask.from_kv_blocks(
        few, few_at, full, full_at, BLOCK_SIZE=_BLOCK, mask_mod=allowed, seq_lengths=(query_length, kv_length)
    )


#: places of a block of FlexAttention
_BLOCK = 128


def _extremes(ids: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest id of every block of places, with a dimension of one at ``dim``."""
    places = -ids.shape[1] % _BLOCK
    blocks = torch.nn.functional.pad(ids, (0, places), value=-1).unflatten(1, (-1, _BLOCK))
    return blocks.amin(2).unsqueeze(dim), blocks.amax(2).unsqueeze(dim)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Of bool [B, Q, K]: how many of each row are true, int32 [B, 1, Q], and a list that begins with them, int32 [B, 1, Q, K]."""
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32).unsqueeze(1), order.to(torch.int32).unsqueeze(1)


class LayerMasks:
    """One mask, lowered once for each way in which the layers of a trunk want it: by their backend, window, width of heads,
    whether heads share keys, and whether flash-attn-4 wins.

    ``told``: takes what each kind of mask was lowered to, ``{"causal, documents": "flex"}``, for the run to print.
    """

    def __init__(
        self, mask: AttentionMask, query_length: int, kv_length: int, tokens: Tensor, told: dict[str, str] | None = None
    ) -> None:
        self.mask, self.query_length, self.kv_length, self.tokens = mask, query_length, kv_length, tokens
        self.told: dict[str, str] = {} if told is None or tokens.is_meta else told
        self._made: dict[Any, LoweredMask] = {}

    def of(self, layer: Any) -> Any:
        """The mask for ``layer``'s mixer; as it is for one without attention."""
        asked = getattr(layer.mixer, "backend", None)
        if asked is None:
            return self.mask
        width, rows, device = layer.mixer.head_dim, self.tokens.shape[0], self.tokens.device
        heads = getattr(layer.mixer, "num_heads", 1)
        kv_heads = getattr(layer.mixer, "num_kv_heads", heads)
        copied = torch.is_grad_enabled() and getattr(layer.mixer, "may_copy_keys", False)
        wins = copied and flash_attn_4_wins(rows, self.query_length, heads, kv_heads, width, device)
        key = (asked, layer.mixer.window, width, heads != kv_heads, wins)
        if key not in self._made:
            mask = dataclasses.replace(self.mask, window=layer.mixer.window)
            lengths = self.query_length, self.kv_length
            backend = choose_backend(asked, mask, *lengths, width, self.tokens.dtype, device, heads != kv_heads, wins)
            self.told[_words(mask)] = backend
            half = self.tokens.dtype.itemsize == 2
            self._made[key] = lower(mask, backend, rows, *lengths, device, half=half)
        return self._made[key]


def _words(mask: AttentionMask) -> str:
    """ "causal, documents, window 128"."""
    parts = [mask.kind, "documents" if mask.document_ids is not None else "", f"window {mask.window}" if mask.window else ""]
    return ", ".join(part for part in parts if part)


def attended_pairs(mask: AttentionMask, batch: int, query_length: int, kv_length: int) -> int:
    """Pairs (query, key) that attention needs, for FLOP counts: by real document lengths if ``document_ids`` is a real CPU
    tensor, else as if each row were one document (causal: half of the square). A prefix is counted as causal."""
    ids = mask.document_ids
    if ids is None or ids.device.type != "cpu" or mask.kv_document_ids is not None:
        window = min(mask.window or kv_length, kv_length)
        if mask.kind == "full":
            return batch * _within(query_length, window) if query_length == kv_length else batch * query_length * kv_length
        # every query sees the places before its own block in full, and half of its own block
        pairs = query_length * (kv_length - query_length) + query_length * query_length // 2
        return batch * min(pairs, query_length * window - (window * window // 2 if query_length == kv_length else 0))
    lengths = document_lengths(ids)
    window = mask.window or query_length
    if mask.kind == "full":
        return sum(_within(int(n), window) for n in lengths)
    near = lengths.clamp(max=window)
    return int((near * (near + 1) // 2 + (lengths - near) * window).sum())


def _within(length: int, window: int) -> int:
    """Pairs of places of a row that are less than ``window`` apart."""
    near = min(length, window)
    return length * (2 * near - 1) - near * (near - 1)


def counted_tokens(shape: Sequence[int], document_ids: Tensor | None) -> int:
    """Tokens of rows [B, S] for FLOP counts: without padding if ``document_ids`` is a real CPU tensor, else all places."""
    if document_ids is None or document_ids.device.type != "cpu":
        return shape[0] * shape[1]
    return int((document_ids >= 0).sum())


def counted_targets(shape: Sequence[int], targets: Tensor | None) -> int:
    """Tokens of rows [B, S] whose logits are needed, for FLOP counts: those with a target if ``targets`` is a real CPU tensor,
    else all."""
    if targets is None or targets.device.type != "cpu":
        return shape[0] * shape[1]
    return int((targets != IGNORE).sum())


def document_lengths(document_ids: Tensor) -> Tensor:
    """Lengths of all documents (runs of one id >= 0 within a row) of [B, S], in order. CPU only: its shape is data."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    lengths = torch.bincount(starts.flatten().cumsum(0) - 1)
    return lengths[document_ids[starts] >= 0]
