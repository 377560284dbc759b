"""MetaModel, Series, Frozen and nested parts; ties; the inference graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l3m_like.core import Frozen, MetaModel, ReadWriteBlock, Series, Tower, UserError, Wrap
from l3m_like.core.meta_model import as_model
from l3m_like.core.wiring import parts_of


class Add(ReadWriteBlock):
    """Writes ``to`` = ``of`` + 1 (keys by name, no stream)."""

    outputs = ("out",)

    def __init__(self, of: str, to: str, **ports: Any) -> None:
        super().__init__(reads={"x": of}, writes={"out": to}, **ports)

    def compute(self, x: Tensor) -> Tensor:
        return x + 1


class Embed(ReadWriteBlock):
    outputs = ("tokens",)

    def __init__(self, **ports: Any) -> None:
        super().__init__(**ports)
        self.embed = nn.Embedding(5, 3)

    def compute(self, ids: Tensor) -> Tensor:
        return self.embed(ids)


class Head(ReadWriteBlock):
    outputs = ("logits", "nll")
    optional_outputs = ("logits", "nll")
    inference_outputs = ("logits",)

    def __init__(self, **ports: Any) -> None:
        super().__init__(**ports)
        self.proj = nn.Linear(3, 5, bias=False)

    def compute(self, tokens: Tensor, *, outputs: Any) -> dict[str, Tensor]:
        logits = tokens @ self.proj.weight.T
        return {name: logits if name == "logits" else logits.logsumexp(-1) for name in outputs}


def language(**more: Any) -> MetaModel:
    return MetaModel(Embed(), head=Head(writes=["nll"]), stream="text", **more)


def test_parts_run_in_order_and_names_are_paths() -> None:
    model = MetaModel(
        preprocessor={"first": Add("a", "b"), "second": Add("b", "c"), "off": None},
        trunk=MetaModel(trunk={"only": Add("c", "d")}),
        postprocessor=Add("d", "e"),
        head={"last": Add("e", "f")},
    )
    paths = ["preprocessor.first", "preprocessor.second", "trunk.trunk.only", "postprocessor", "head.last"]
    assert [path for path, _ in model.blocks()] == paths
    data = {"a": torch.zeros(1)}
    out = model(data)
    assert set(data) == {"a"} and [float(out[key]) for key in "abcdef"] == [0, 1, 2, 3, 4, 5]


def test_streams_reach_the_blocks() -> None:
    model = MetaModel({"text": Embed(), "own": Embed(stream="note")}, stream="text")
    assert [block.writes["tokens"] for _, block in model.blocks()] == ["text_tokens", "note_tokens"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MetaModel(), "MetaModel is empty"),
        (lambda: MetaModel(nn.Linear(2, 2)), "preprocessor is a Linear; a part is a block.*Wrap"),
        (lambda: MetaModel(head={"a": [Add("a", "b")]}), "head.a is a list"),
        (
            lambda: MetaModel(Embed(), tie={"preprocessor.embed.weigth": "preprocessor.embed.weight"}),
            "Did you mean 'preprocessor.embed.weight'",
        ),
        (
            lambda: language(tie={"head.proj.weight": "preprocessor.embd.weight"}),
            "tie: 'preprocessor.embd.weight' is not a parameter",
        ),
    ],
)
def test_what_is_no_model(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_ties_survive_to_empty() -> None:
    with torch.device("meta"):
        model = language(tie={"head.proj.weight": "preprocessor.embed.weight"})
    assert len(list(model.parameters())) == 1
    model.to_empty(device="cpu")
    model.retie()
    assert model.head.proj.weight is model.preprocessor.embed.weight and len(list(model.parameters())) == 1
    assert set(dict(model.named_parameters())) == {"preprocessor.embed.weight"}


def test_the_inference_graph() -> None:
    model = MetaModel(
        {"noise": Add("image", "noised", training_only=True), "text": Embed(stream="text")},
        head=Head(stream="text", writes=["nll"]),
    )
    graph = model.inference()
    assert [step.path for step in graph.steps] == ["preprocessor.text", "head"] and graph.inference
    out = model({"text_ids": torch.arange(4)}, graph)
    assert "text_logits" in out and "text_nll" not in out and "noised" not in out
    trained = model({"text_ids": torch.arange(4), "image": torch.zeros(1)})
    assert "text_nll" in trained and "text_logits" not in trained and "noised" in trained


def test_a_named_dict_is_a_series() -> None:
    made = as_model({"one": MetaModel(Add("a", "b")), "two": MetaModel(Add("b", "c"))})
    assert isinstance(made, Series) and list(parts_of(made)) == ["one", "two"]
    alone = language()
    assert as_model(alone) is alone and parts_of(alone) == {"": alone}
    with pytest.raises(UserError, match="model.one is a Add; a named model is a MetaModel"):
        parts_of(as_model({"one": Add("a", "b")}))
    with pytest.raises(UserError, match="model is a Linear"):
        parts_of(nn.Linear(1, 1))


# ---- frozen parts --------------------------------------------------------------------------------------------------------


def test_frozen() -> None:
    inner = MetaModel(
        {"a": Add("x", "y"), "net": Wrap(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9)), reads={"i": "y"}, writes={"o": "z"})}
    )
    frozen = Frozen(inner, dtype="bfloat16")
    model = MetaModel({"teacher": frozen}, head=Wrap(nn.Linear(3, 1), reads={"i": "z"}, writes={"o": "out"}))
    model.train()
    assert not any(module.training for module in frozen.modules()) and model.head.training
    assert not any(p.requires_grad for p in frozen.parameters()) and all(p.dtype == torch.bfloat16 for p in frozen.parameters())
    assert frozen.reads == {"x": "x"} and set(frozen.writes) == {"y", "z"} and frozen.required == {"x"}
    assert [path for path, _ in model.blocks()] == ["preprocessor.teacher", "head"]  # one block from outside
    x = torch.ones(2, 3, requires_grad=True)
    out = model({"x": x})
    assert out["z"].dtype == torch.bfloat16 and not out["z"].requires_grad and torch.equal(out["z"], model({"x": x})["z"])
    out["out"].sum().backward()
    assert x.grad is None and model.head.module.weight.grad is not None
    with pytest.raises(UserError, match="Frozen.dtype: there is no dtype 'bfloat'. Did you mean 'bfloat16'"):
        Frozen(inner, dtype="bfloat")


def test_frozen_may_pass_gradients() -> None:
    """To what its input was made of, and never to its own weights."""
    for passes in (False, True):
        frozen = Frozen(Wrap(torch.nn.Linear(3, 3), reads={"x": "x"}, writes={"y": "y"}), passes_gradients=passes)
        x = torch.ones(2, 3, requires_grad=True)
        y = frozen({"x": x})["y"]
        assert y.requires_grad == passes and not frozen.training
        if passes:
            y.sum().backward()
            assert x.grad is not None and all(p.grad is None for p in frozen.parameters())


def test_frozen_takes_the_stream() -> None:
    model = MetaModel({"encoder": Frozen(Embed())}, stream="text")
    block = model.preprocessor["encoder"]
    assert block.reads == {"text_ids": "text_ids"} and block.writes == {"text_tokens": "text_tokens"}
    assert "text_tokens" in model({"text_ids": torch.arange(3)})


class Notes(Add):
    """Notes what it is told."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.told: list[Any] = []

    def bind(self, mesh: Any) -> None:
        self.told.append(("bind", mesh))

    def after_step(self, mesh: Any, skipped: Any = None) -> None:
        self.told.append(("after_step", mesh))


def test_blocks_in_towers_and_frozen_parts_are_told() -> None:
    free, still = Notes("image", "y"), Notes("y", "z")
    model = MetaModel({"tower": Tower(free, dummy={"image": [3]}), "frozen": Frozen(still)})
    for _, block in model.blocks():
        block.bind(1)
        block.after_step(2)
    assert free.told == [("bind", 1), ("after_step", 2)] and still.told == [("bind", 1)]  # what is frozen does not change


@pytest.mark.parametrize("nest", [lambda m: Frozen(m), lambda m: Tower(m, dummy={"image": [3]})])
def test_the_inference_graph_reaches_inside(nest: Any) -> None:
    parts = {"noise": Add("image", "noised", training_only=True), "text": Embed(stream="text")}
    inner = MetaModel(parts, head=Head(stream="text", writes=["nll"]))
    model = MetaModel({"nested": nest(inner)})
    data = {"text_ids": torch.arange(4), "image": torch.zeros(1, 3)}
    out = model(data, model.inference())
    assert "text_logits" in out and "text_nll" not in out and "noised" not in out
    assert set(model.preprocessor["nested"].writes_in(True)) == {"text_tokens", "text_logits"}
    trained = model(data)
    assert "text_nll" in trained and "text_logits" not in trained and "noised" in trained
