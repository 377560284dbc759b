"""Multi-token prediction against its formula (arXiv:2412.19437, eq. 21 to 24), and at the borders of documents."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_like.blocks import LanguageModelHead, MultiTokenPrediction, TokenEmbed, Transformer
from l3m_like.config import RunConfig
from l3m_like.core import MetaModel
from l3m_like.core.errors import UserError
from l3m_like.core.meta_model import as_model
from l3m_like.kernels.attention import LoweredMask
from l3m_like.layers import Attention, MoE, RMSNorm, Rope, SwiGLU, TransformerLayer
from l3m_like.losses import AheadNLL
from l3m_like.pretrained import NameMap, family
from l3m_like.training.updates import refuse_untied

V, D, S = 50, 16, 9
MIXER = partial(Attention, num_heads=2)
LAYER = partial(TransformerLayer, mixer=MIXER, mlp=partial(SwiGLU, hidden_dim=24))
EXPERTS = partial(TransformerLayer, mixer=MIXER, mlp=partial(MoE, hidden_dim=8, experts=4, top_k=2))


def model_of(layer: object = LAYER) -> MetaModel:
    model = MetaModel(
        preprocessor=TokenEmbed(V, D),
        trunk=Transformer(D, 1, LAYER, Rope(8, 1e4)),
        postprocessor=MultiTokenPrediction(V, D, layer, Rope(8, 1e4)),  # type: ignore[arg-type]
        head=LanguageModelHead(V, D, writes=["nll"]),
        stream="text",
        tie={"postprocessor.head.weight": "head.proj.weight", "postprocessor.final_norm.weight": "head.norm.weight"},
    ).double()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3
        p.data = noise + 1 if "norm" in name else noise
    return model


def rows() -> dict[str, Tensor]:
    """Documents of 5 and 3 tokens and padding; a row that is one document, whose last target lies behind the row."""
    ids = torch.randint(0, V, (2, S + 1), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, -1], [0] * S])
    targets = ids[:, 1:].clone()
    targets[0, [4, 7, 8]] = -100
    targets[1, 2] = -100  # masked, as of a prompt
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0], list(range(S))])
    return {"text_ids": ids[:, :S], "text_targets": targets, "text_document_ids": documents, "text_positions": positions}


def by_formula(model: MetaModel, data: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Document by document: h'_i = M [RMS(Emb(t_{i+1})); RMS(h_i)], h = TRM(h'), p(t_{i+2}) = softmax(head(h_i)), where the main
    model's h_i are those that its own output matrix is multiplied with."""
    ahead, total, count = model.postprocessor, torch.zeros((), dtype=torch.float64), 0

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    for row, start, end in ((0, 0, 5), (0, 5, 8), (1, 0, S)):
        embeddings = model.preprocessor.embed.weight[data["text_ids"][row, start:end]]
        hidden = norm(model.trunk.compute(embeddings.unsqueeze(0))[0], model.head.norm.weight)
        pairs = [
            torch.cat((norm(embeddings[i + 1], ahead.token_norm.weight), norm(hidden[i], ahead.hidden_norm.weight)))
            for i in range(end - start - 1)
        ]
        x = torch.stack(pairs) @ ahead.proj.weight.mT
        rope = Rope(8, 1e4)(torch.arange(len(x)), torch.float64)
        seen = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        x = ahead.layer(x.unsqueeze(0), rope, LoweredMask("reference", seen[None, None]))[0]
        logits = norm(x, ahead.norm.weight) @ model.head.proj.weight.mT
        for i in range(len(x)):
            target = int(data["text_targets"][row, start + i + 1])
            if target != -100:
                total, count = total + F.cross_entropy(logits[i], torch.tensor(target)), count + 1
    return total, count


def test_is_the_formula() -> None:
    model, data = model_of(), rows()
    out, loss = model(data), AheadNLL(stream="text")
    total, count = by_formula(model, data)
    assert int(loss.count_of(data)) == count
    torch.testing.assert_close(loss.compute(out["text_ahead_nll"]), total, rtol=1e-10, atol=1e-12)
    wanted = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    found = torch.autograd.grad(out["text_ahead_nll"].sum(), list(model.parameters()), allow_unused=True)
    for (name, _), a, b in zip(model.named_parameters(), found, wanted, strict=True):
        if b is None:
            assert a is None or not a.any(), name
        else:
            assert a is not None
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)
    assert model.postprocessor.head.weight is model.head.proj.weight


def test_a_state_before_the_final_norm_is_found() -> None:
    """As if the layer were given the trunk's output itself."""
    model, data = model_of(), rows()
    total, _ = by_formula(model, data)
    model.postprocessor.final_norm = torch.nn.Identity()
    found = model(data)["text_ahead_nll"].sum()
    assert (found - total).abs() > 1e-3 * total


def test_documents_do_not_see_each_other() -> None:
    model, data = model_of(), rows()
    changed = data | {"text_ids": data["text_ids"].clone()}
    changed["text_ids"][0, 5:] = (changed["text_ids"][0, 5:] + 7) % V
    first, second = (model(d)["text_ahead_nll"] for d in (data, changed))
    assert torch.equal(first[0, :5], second[0, :5]) and not torch.equal(first[0, 5:], second[0, 5:])


def test_is_left_out_at_inference() -> None:
    model, data = model_of(), rows()
    steps = [step.path for step in model.inference().steps]
    assert steps == ["preprocessor", "trunk", "head"]
    assert "text_logits" in model({"text_ids": data["text_ids"]}, model.inference())


def test_its_layer_may_have_experts() -> None:
    block = MultiTokenPrediction(V, D, EXPERTS, Rope(8, 1e4), writes=["ahead_router_load"], stream="text")
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, data = torch.randn(2, S, D), rows()
    out = block({"text_hidden": x, "text_tokens": x, **data})
    assert out["text_ahead_router_load"].shape == (1, 2, 4) and out["text_ahead_router_load"].sum() == 2 * (8 + S)
    assert block.flops(x, x, data["text_targets"]) > 2 * 2 * S * (2 * D * D + V * D)


def test_is_not_trained_apart_from_the_head() -> None:
    model = model_of()
    refuse_untied({"": model})
    model.postprocessor.final_norm = RMSNorm(D)  # as a config without this tie makes it
    with pytest.raises(UserError, match="`tie`: {postprocessor.final_norm.weight: head.norm.weight}"):
        refuse_untied({"": model})


def test_published_names() -> None:
    with torch.device("meta"):
        model = as_model(RunConfig.from_file(Path(__file__).parents[2] / "configs/experiment/deepseek.yaml").instantiate("model"))
    names = NameMap.of(family("deepseek_v3").names, model)
    assert names.left == () and "lm_head.weight" in names.tied
    assert names.shapes["model.layers.61.eh_proj.weight"] == (128, 256)
    assert names.shapes["model.layers.61.mlp.experts.7.down_proj.weight"] == (128, 96)
    assert names.shapes["model.layers.2.mlp.gate.e_score_correction_bias"] == (8,)
    assert family("deepseek_v3").describe(model)["first_k_dense_replace"] == 1
