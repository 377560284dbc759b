"""Masked diffusion against transformers; packed against unpacked; block diffusion against its two limits; and no leaks."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from rule import check_gradients, check_values, gradients, perturb
from test_language_model import FAMILIES, D, V, ours_of, reference_of
from torch import Tensor

from l3m_like.blocks import CleanCopy, LanguageModelHead, MaskTokens, NoisyHalf, TokenEmbed
from l3m_like.core import MetaModel
from l3m_like.losses import MaskedDiffusion
from l3m_like.pretrained import NameMap, export_state, import_state
from l3m_like.pretrained.decoder import NAMES

MASK = V - 1


def text(lengths: tuple[int, ...], rows: int = 2, size: int | None = None, seed: int = 1) -> dict[str, Tensor]:
    """Rows of documents with these lengths, padded to ``size``."""
    size = sum(lengths) if size is None else size
    ids = torch.randint(0, MASK, (rows, size), generator=torch.Generator().manual_seed(seed))
    padding = size - sum(lengths)
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), -1)]).int()
    positions = torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(padding, dtype=torch.int64)])
    last = documents != torch.cat((documents[1:], torch.tensor([-2]))).int()
    targets = torch.where(last | (documents < 0), -100, ids.roll(-1, 1))
    keys = {"ids": ids, "targets": targets, "positions": positions.repeat(rows, 1), "document_ids": documents.repeat(rows, 1)}
    return {f"text_{name}": value for name, value in keys.items()} | {"row": torch.arange(rows)}


def diffusion(family: str = "qwen3_tied", block: int | None = None, **noise: object) -> MetaModel:
    """The decoder of ``family`` with noise before it; with ``block`` one of block diffusion."""
    made = ours_of(family, mask="full" if block is None else "staged")
    eps, tied = FAMILIES[family][7:]
    mask = MaskTokens(MASK, V, 0, block=block, **noise)
    into = "text" if block is None else "paired"
    made.trunk.stream = into
    reads = {"targets": "text_masked_targets"} | ({} if block is None else {"hidden": "text_noisy_hidden"})
    return MetaModel(
        noise=mask if block is None else {"mask": mask, "clean": CleanCopy(block, "paired")},
        preprocessor=TokenEmbed(V, D, reads={"ids": f"{into}_noised"}, stream=into),
        trunk=made.trunk,
        postprocessor=None if block is None else NoisyHalf(reads={"hidden": "paired_hidden"}),
        head=LanguageModelHead(V, D, eps, reads=reads, writes=["logits", "weighted_nll"]),
        stream="text",
        tie={"head.proj.weight": "preprocessor.embed.weight"} if tied else None,
    )


def elbo(model: MetaModel, data: dict[str, Tensor], **settings: bool) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and all keys."""
    model.zero_grad()
    out = model(data)
    loss = MaskedDiffusion(stream="text", **settings)
    value = loss.compute(out["text_weighted_nll"]) / loss.count_of(data)
    value.backward()
    return value.detach(), {name: g.clone() for name, g in gradients(model).items()}, out


# ---- transformers ----------------------------------------------------------------------------------------------------


def against_transformers(family: str, dtype: torch.dtype, shift: bool, fault: str | None = None) -> None:
    """LLaDA is a Llama whose additive mask is zero; Dream and models made from Qwen3 predict the next place."""
    ours = diffusion(family, shift=shift).to(dtype)
    perturb(ours)
    names = NameMap.of(NAMES, ours)
    reference = reference_of(family, dtype)
    reference.load_state_dict(export_state(names, dict(ours.named_parameters())), strict=False)
    if fault == "causal":
        ours.trunk.mask = "causal"
    data = text((12,))
    loss, grads, out = elbo(ours, data, shift=shift)
    noised = out["text_noised"]
    logits = reference(input_ids=noised, attention_mask=torch.zeros(2, 1, 12, 12, dtype=dtype), use_cache=False).logits
    check_values(out["text_logits"].detach(), logits.detach())
    masked = noised == MASK
    assert 3 < masked.sum() < 23
    # the loss by its equation, from the noised ids and the probabilities alone
    keys = (data[key] for key in ("row", "text_document_ids", "text_positions"))
    probability = 0.001 + 0.999 * ours.noise._times("mask_tokens/text", *keys)
    if shift:
        logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)
    nll = F.cross_entropy(logits.flatten(0, 1), data["text_ids"].flatten(), reduction="none").view(2, 12)
    theirs = (nll * masked * (1 / probability).float().to(dtype)).sum() / (22 if shift else 24)
    theirs.backward()
    check_values(loss, theirs.detach())
    vanishing = {"k_proj.bias": "softmax ignores what all keys have in common; RoPE leaves a little of it"}
    check_gradients(grads, import_state(names, gradients(reference)), vanishing=vanishing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("family", "shift"), [("llama3", False), ("qwen3", True), ("qwen2", True)])
def test_equals_transformers(family: str, shift: bool, dtype: torch.dtype) -> None:
    against_transformers(family, dtype, shift)


def test_a_causal_mask_is_found() -> None:
    with pytest.raises(AssertionError):
        against_transformers("llama3", torch.float64, False, fault="causal")


# ---- finetuning ------------------------------------------------------------------------------------------------------


def test_every_answer_counts_the_same() -> None:
    """(1 / answers) sum over answers of (1 / length) sum over its masked tokens of nll / p (LLaDA, algorithm 2)."""
    lengths, prompts = (5, 8, 3), (2, 3, 3)  # the third has no answer
    data = text(lengths, rows=2, size=18)
    starts = (0, 5, 13)
    for start, prompt in zip(starts, prompts, strict=True):  # the loader's target of a token is the next one
        data["text_targets"][:, start : start + prompt - 1] = -100
    noise = {"answers_only": True, "per_document": True}
    model = diffusion(**noise).double()
    perturb(model)
    loss, _, out = elbo(model, data, **noise)
    p = 0.001 + 0.999 * model.noise._times("mask_tokens/text", *(data[k] for k in ("row", "text_document_ids", "text_positions")))
    nll = F.cross_entropy(out["text_logits"].flatten(0, 1), data["text_ids"].flatten(), reduction="none").view(2, 18)
    answers = []
    for row, (start, length, prompt) in itertools.product(range(2), zip(starts[:2], lengths[:2], prompts[:2], strict=True)):
        at = slice(start + prompt, start + length)
        masked = (out["text_noised"][row, at] == MASK).double()
        answers.append((nll[row, at] * masked / p[row, at]).sum() / (length - prompt))
    wanted = torch.stack(answers).mean().detach()
    assert abs(float(loss) - float(wanted)) < 1e-6 * float(wanted)  # the weights are float32
    assert float(loss) > 0 and (out["text_noised"] == MASK).sum() > 4
    # per token, another number comes out
    tokens, _, _ = elbo(diffusion(answers_only=True).double(), data, answers_only=True)
    assert abs(float(tokens) - float(wanted)) > 1e-3 * float(wanted)


# ---- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [None, 3])
def test_packed_equals_unpacked(block: int | None) -> None:
    """The same noised documents, in one row or in a row each."""
    lengths = (5, 8, 3)
    packed = text(lengths, rows=1, size=18)
    model = diffusion(block=block).double()
    perturb(model)
    loss, grads, out = elbo(model, packed)
    inner = MetaModel(*(getattr(model, part, None) for part in ("preprocessor", "trunk", "postprocessor", "head")), stream="text")
    model.zero_grad()
    total, at = 0.0, 0
    for n in lengths:
        part = {key: out[f"text_{key}"][:, at : at + n] for key in ("noised", "masked_targets", "weights", "ids", "positions")}
        data = {f"text_{key}": value for key, value in part.items()}
        documents = torch.zeros(1, n, dtype=torch.int32)
        if block is not None:
            keys = model.noise["clean"].compute(part["noised"], part["ids"], part["positions"], documents)
            data |= dict(zip(model.noise["clean"].writes.values(), keys, strict=True))
        total, at = total + inner(data)["text_weighted_nll"].sum(), at + n
    (total / 16).backward()
    check_values(loss, (total / 16).detach())
    check_gradients(grads, gradients(model))


# ---- block diffusion and its limits ----------------------------------------------------------------------------------


def test_one_block_is_plain_masked_diffusion() -> None:
    data = text((7, 5), size=14)
    plain, blocks = diffusion().double(), diffusion(block=7).double()
    for model in (plain, blocks):
        perturb(model)
    (loss, grads, out), (loss_blocks, grads_blocks, out_blocks) = elbo(plain, data), elbo(blocks, data)
    assert torch.equal(out["text_noised"], out_blocks["text_noised"])
    check_values(loss_blocks, loss)
    check_gradients(grads_blocks, grads)
    smaller = diffusion(block=4).double()
    perturb(smaller)
    smaller.noise["mask"].block = None  # the same draws, for another mask
    assert abs(float(elbo(smaller, data)[0] - loss)) > 1e-3


def test_blocks_of_one_token_are_an_autoregressive_likelihood() -> None:
    """With everything masked, the probabilities of all texts sum to one; and each token's depends on the clean ones before."""
    size, few = 3, 4
    model = diffusion(block=1, p_min=1.0).double()
    perturb(model)
    model.head.proj = torch.nn.Linear(D, few, bias=False).double()
    ids = torch.tensor(list(itertools.product(range(few), repeat=size)))
    data = text((size,), rows=len(ids)) | {"text_ids": ids}
    with torch.no_grad():
        nll = model(data)["text_weighted_nll"]
    assert abs(float((-nll.sum(1)).exp().sum()) - 1) < 1e-12
    for place in range(size):  # nll of token `place`, by all that may decide it, is one number; by less it is not
        for known, one_number in ((place + 1, True), (place, False)):
            groups: dict[tuple[int, ...], list[float]] = {}
            for row, value in zip(ids.tolist(), nll[:, place].tolist(), strict=True):
                groups.setdefault(tuple(row[:known]), []).append(value)
            assert all(max(values) - min(values) < 1e-12 for values in groups.values()) is one_number


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_blocks_do_not_leak(backend: str) -> None:
    """Which inputs decide an output, by gradients: for every pair of the doubled row, exactly those that the rule names."""
    lengths, block, size = (5, 4), 2, 10
    model = diffusion(block=block)
    for layer in model.trunk.layers:
        layer.mixer.backend = backend
    model.double()
    perturb(model)
    data = text(lengths, rows=1, size=size)
    copy = model.noise["clean"]
    ports = [data[f"text_{name}"] for name in ("ids", "positions", "document_ids")]
    _, positions, documents, stages = copy.compute(data["text_ids"], *ports)
    tokens = torch.randn(1, 2 * size, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hidden = model.trunk.compute(tokens, positions, documents, stages=stages)
    for query in range(2 * size):
        if documents[0, query] < 0:
            continue
        (grad,) = torch.autograd.grad(hidden[0, query].sum(), tokens, retain_graph=True)
        reached = grad[0].abs().amax(1) > 0
        for key in range(2 * size):
            noisy_q, noisy_k = query < size, key < size
            same = documents[0, query] == documents[0, key]
            block_q, block_k = positions[0, query] // block, positions[0, key] // block
            allowed = block_q == block_k if noisy_q and noisy_k else block_k < block_q if noisy_q else block_k <= block_q
            assert bool(reached[key]) == bool(same and allowed and not (noisy_k and not noisy_q)), (query, key)


def test_a_leak_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: noisy tokens see the clean copy of their own block."""

    def leaking(query: Tensor, key: Tensor) -> Tensor:
        return (key == query) | ((key % 2 == 1) & (key <= query + 1))

    monkeypatch.setattr("l3m_like.layers.masks._staged", leaking)
    with pytest.raises(AssertionError):
        test_blocks_do_not_leak("sdpa")
