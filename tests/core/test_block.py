"""Blocks: ports from the signature of compute, keys from ports, and errors that name the nearest port."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l3m_like.core import ReadWriteBlock, UserError, Wrap


class Scale(ReadWriteBlock):
    outputs = ("tokens",)

    def compute(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return hidden * (1 if mask is None else mask)


class Split(ReadWriteBlock):
    outputs = ("low", "high")

    def compute(self, image: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        return image - row, image + row


class Head(ReadWriteBlock):
    outputs = ("logits", "nll")
    optional_outputs = ("logits", "nll")
    inference_outputs = ("logits",)

    def compute(self, hidden: Tensor, *, outputs: Any) -> dict[str, Tensor]:
        return {name: hidden + len(name) for name in outputs}


def test_ports_and_default_keys() -> None:
    block = Scale(stream="text")
    assert block.ports == {"hidden": False, "mask": True} and block.required == {"hidden"}
    assert block.reads == {"hidden": "text_hidden", "mask": "text_mask"} and block.writes == {"tokens": "text_tokens"}
    assert Scale().reads == {"hidden": "hidden", "mask": "mask"}
    image = Split(stream="image")  # the port that is the stream's name, and the global one
    assert image.reads == {"image": "image", "row": "row"}
    assert image.writes == {"low": "image_low", "high": "image_high"}


def test_renamed_ports() -> None:
    block = Scale(stream="text", reads={"mask": "other_mask"}, writes={"tokens": "joined"})
    assert block.reads == {"hidden": "text_hidden", "mask": "other_mask"} and block.writes == {"tokens": "joined"}
    assert block.required == {"hidden", "mask"}  # an optional port that is named is wanted
    assert Scale(stream="text", writes=["tokens"]).writes == {"tokens": "text_tokens"}
    block.set_stream("image")
    assert block.reads["hidden"] == "text_hidden"  # its own stream stays
    late = Scale()
    late.set_stream("image")
    assert late.reads["hidden"] == "image_hidden"


def test_the_dictionary_is_not_changed() -> None:
    data = {"text_hidden": torch.ones(2), "other": torch.zeros(1)}
    out = Scale(stream="text")(data)
    assert set(data) == {"text_hidden", "other"} and set(out) == {"text_hidden", "other", "text_tokens"}
    assert torch.equal(Scale(stream="text")(data | {"text_mask": torch.tensor(3.0)})["text_tokens"], torch.full((2,), 3.0))
    low_high = Split(stream="image")({"image": torch.ones(2), "row": torch.tensor([1.0, 2.0])})
    assert low_high["image_low"].tolist() == [0, -1] and low_high["image_high"].tolist() == [2, 3]


def test_optional_outputs() -> None:
    block = Head(stream="text", writes=["nll"])
    out = block({"text_hidden": torch.zeros(1)})
    assert set(out) == {"text_hidden", "text_nll"} and "outputs" not in block.ports
    assert set(block({"text_hidden": torch.zeros(1)}, True)) == {"text_hidden", "text_logits"}
    assert block.writes_in(True) == {"logits": "text_logits"} and block.writes_in(False) == {"nll": "text_nll"}
    with pytest.raises(UserError, match=r"Head writes nothing: name one of \['logits', 'nll'\]"):
        Head()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reads": {"hiden": "x"}}, "Scale has no read port 'hiden'. Did you mean 'hidden'?"),
        ({"reads": {"q": "x"}}, "Available: hidden, mask"),
        ({"writes": {"token": "x"}}, "Scale has no write port 'token'. Did you mean 'tokens'?"),
        ({"writes": ["token"]}, "Did you mean 'tokens'?"),
    ],
)
def test_a_wrong_port(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Scale(**settings)
    assert message in str(error.value)


def test_signatures_that_say_nothing() -> None:
    class Swallows(ReadWriteBlock):
        outputs = ("x",)

        def compute(self, **kwargs: Any) -> Any:
            return kwargs

    class Positional(ReadWriteBlock):
        outputs = ("x",)

        def compute(self, *args: Any) -> Any:
            return args

    class Default(ReadWriteBlock):
        outputs = ("x",)

        def compute(self, x: Tensor, scale: float = 2.0) -> Any:
            return x * scale

    class Empty(ReadWriteBlock):
        outputs = ("x",)

    with pytest.raises(UserError, match=r"Empty does not define compute\(\.\.\.\)"):
        Empty()
    for wrong in (Swallows, Positional):
        with pytest.raises(UserError, match=r"takes \*args or \*\*kwargs; its parameters must be named ports"):
            wrong()
    with pytest.raises(UserError, match="the default of port 'scale' must be None"):
        Default()
    with pytest.raises(TypeError):
        Scale(hidden="x")


class Shuffled(ReadWriteBlock):
    outputs = ("tokens",)

    def __init__(self, shuffle: bool, **ports: Any) -> None:
        super().__init__(**ports)
        self.read_if("row", shuffle)

    def compute(self, hidden: Tensor, row: Tensor | None = None) -> Tensor:
        return hidden if row is None else hidden[row]


def test_a_port_that_a_setting_asks_for() -> None:
    data = {"hidden": torch.arange(3.0), "row": torch.tensor([2, 0, 1])}
    assert Shuffled(True).reads == {"hidden": "hidden", "row": "row"} and Shuffled(False).reads == {"hidden": "hidden"}
    assert Shuffled(True)(data)["tokens"].tolist() == [2, 0, 1] and Shuffled(False)(data)["tokens"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="`reads` names 'row', which is not read with these settings"):
        Shuffled(False, reads={"row": "image_row"})


def test_a_missing_key_and_a_wrong_number_of_outputs() -> None:
    with pytest.raises(TypeError, match="hidden"):
        Scale(stream="text")({"text_mask": torch.ones(1)})

    class Short(Split):
        def compute(self, image: Tensor, row: Tensor) -> Any:
            return (image,)

    with pytest.raises(ValueError):
        Short(stream="image")({"image": torch.ones(1), "row": torch.ones(1)})


def test_wrap() -> None:
    block = Wrap(nn.Bilinear(2, 3, 4), reads={"a": "left", "b": "right"}, writes={"out": "product"})
    data = {"left": torch.ones(5, 2), "right": torch.ones(5, 3, dtype=torch.float64), "x": 1}
    assert block.reads == {"a": "left", "b": "right"} and block.writes == {"out": "product"}
    assert block(data)["product"].shape == (5, 4) and block(data)["product"].dtype == torch.float32
    assert block.double()(data)["product"].dtype == torch.float64  # inputs follow the weights
    assert list(block.state_dict()) == ["module.weight", "module.bias"]

    class Two(nn.Module):
        def forward(self, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
            return {"second": ids, "first": x}

    named = Wrap(Two(), reads={"x": "a", "ids": "b"}, writes={"first": "c", "second": "d"}, training_only=True)
    ids = torch.arange(3)
    out = named({"a": torch.ones(1), "b": ids})
    assert out["d"] is ids and out["c"].tolist() == [1] and named.training_only
    with pytest.raises(UserError, match="Wrap needs reads"):
        Wrap(nn.Identity(), reads={}, writes={"x": "y"})


def test_flops_of_a_block_that_declares_none() -> None:
    assert Scale().flops() == 0  # no parameters
    assert Wrap(nn.Linear(2, 2), reads={"x": "x"}, writes={"y": "y"}).flops(x=torch.ones(1, 2)) is None
