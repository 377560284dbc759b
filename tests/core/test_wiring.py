"""The wiring check: what is missing, overwritten, never read, and when keys die."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l3m_like.core import Frozen, KeySpec, MetaModel, ReadWriteBlock, Tower, UserError, Wrap
from l3m_like.core.wiring import Program, Trace, Wiring, check_wiring
from l3m_like.losses import Loss


class Net(ReadWriteBlock):
    """hidden = linear(tokens) + bias."""

    outputs = ("hidden",)

    def __init__(self, width: int = 4, **ports: Any) -> None:
        super().__init__(**ports)
        self.proj = nn.Linear(4, width)

    def compute(self, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.proj(tokens) + (0 if bias is None else bias)

    def flops(self, tokens: Tensor, bias: Tensor | None = None) -> int:
        return 2 * tokens.shape[0] * tokens.shape[1] * self.proj.in_features * self.proj.out_features


class Square(Loss):
    def compute(self, hidden: Tensor) -> Tensor:
        return hidden.square().sum()

    def count(self, tokens: Tensor) -> Tensor:
        return torch.tensor(tokens.numel())


class Late(Loss):
    count_late = True

    def compute(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden.sum(), torch.tensor(hidden.numel())


DATA = {
    "text_tokens": KeySpec(torch.float32, ("B", 3, 4)),
    "text_label": KeySpec(torch.int64, ("B",)),
    "row": KeySpec(torch.int64, ("B",)),
}


def check(model: MetaModel, losses: dict[str, Any] | None = None, keep: Any = (), data: Any = DATA) -> Wiring:
    losses = {"square": Square(stream="text")} if losses is None else losses
    return check_wiring([Program("main", {"": model}, losses)], data, keep)


def chain(**more: Any) -> MetaModel:
    return MetaModel({"a": Net(writes={"hidden": "text_mid"})}, trunk=Net(reads={"tokens": "text_mid"}, **more), stream="text")


@pytest.mark.parametrize(
    ("model", "losses", "message"),
    [
        (
            lambda: MetaModel(Net(), stream="txt"),
            None,
            r"preprocessor \(Net\) reads 'txt_tokens' for its port 'tokens'.* Did you mean 'text_tokens'\?",
        ),
        (lambda: MetaModel(Net(reads={"bias": "text_biass"}), stream="text"), None, "reads 'text_biass' for its port 'bias'"),
        (
            lambda: MetaModel(
                trunk={"b": Net(reads={"tokens": "text_mid"}), "a": Net(writes={"hidden": "text_mid"})}, stream="text"
            ),
            None,
            "trunk.b .* reads 'text_mid'",
        ),
        (
            lambda: MetaModel(Net(), stream="text"),
            {"square": Square(stream="text", reads={"hidden": "text_hiden"})},
            r"loss.square \(Square\) reads 'text_hiden'.*Did you mean 'text_hidden'",
        ),
        (
            lambda: MetaModel(Net(), stream="text"),
            {"square": Square(stream="text", reads={"tokens": "text_hidden"})},
            "counts on 'text_hidden' .*which the data does not write.*count_late",
        ),
        (
            lambda: MetaModel({"a": Net(), "b": Net()}, stream="text"),
            None,
            r"preprocessor.b \(Net\) writes 'text_hidden' \(port 'hidden'\), which preprocessor.a already wrote. No block",
        ),
        (lambda: MetaModel(Net(writes={"hidden": "text_tokens"}), stream="text"), None, "which the data already wrote"),
    ],
)
def test_errors(model: Any, losses: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(model(), losses)


def test_what_is_available_is_listed() -> None:
    with pytest.raises(UserError) as error:
        check(MetaModel(Net(), stream="other"))
    assert "Available there: row, text_label, text_tokens." in str(error.value)


def test_unread_keys_are_warned_of() -> None:
    model = MetaModel({"a": Net(), "b": Net(writes={"hidden": "text_extra"})}, stream="text")
    assert check(model).warnings == ["'text_extra' is written by preprocessor.b and read by nothing"]
    assert check(model, keep=["text_extra"]).warnings == []
    with pytest.raises(UserError, match="keep: nothing writes 'text_exra'. Did you mean 'text_extra'"):
        check(model, keep=["text_exra"])
    metric = Program("main", {"": model}, {"square": Square(stream="text")}, extra_reads={"text_extra": "metrics.x"})
    assert check_wiring([metric], DATA).warnings == []
    wrong = Program("main", {"": model}, {"square": Square(stream="text")}, extra_reads={"text_extr": "metrics.x"})
    with pytest.raises(UserError, match="metrics.x reads 'text_extr', which nothing writes. Did you mean 'text_extra'"):
        check_wiring([wrong], DATA)


def test_an_optional_port_is_read_if_its_key_is_there() -> None:
    model = MetaModel({"bias": Net(writes={"hidden": "text_bias"}), "net": Net()}, stream="text")
    assert check(model).warnings == []
    assert check(MetaModel(Net(), stream="text")).warnings == []


def drops(wiring: Wiring) -> dict[str, tuple[str, ...]]:
    return {step.path: tuple(sorted(step.drop)) for step in wiring.graphs["main"][""].steps}


def test_a_key_is_dropped_after_its_last_reader() -> None:
    assert drops(check(chain())) == {"preprocessor.a": ("text_tokens",), "trunk": ("text_mid",)}
    assert drops(check(chain(), keep=["text_mid"])) == {"preprocessor.a": ("text_tokens",), "trunk": ()}
    late = drops(check(chain(), {"late": Late(stream="text"), "first": Late(reads={"hidden": "text_tokens"})}))
    assert late == {"preprocessor.a": (), "trunk": ("text_mid",)}  # a loss reads the tokens


def test_dropped_tensors_are_freed() -> None:
    """Under no_grad, nothing else holds them: the tensor is gone before the next block runs."""
    alive: dict[str, weakref.ref[Tensor]] = {}
    seen: list[bool] = []

    class Watch(ReadWriteBlock):
        outputs = ("last",)

        def compute(self, hidden: Tensor) -> Tensor:
            seen.append(alive["mid"]() is None)
            return hidden

    for keep in ((), ("text_mid",)):
        model = MetaModel(
            {"a": Net(writes={"hidden": "text_mid"})}, trunk=Net(reads={"tokens": "text_mid"}), head=Watch(), stream="text"
        )
        model.preprocessor["a"].register_forward_hook(lambda block, args, out: alive.update(mid=weakref.ref(out["text_mid"])))
        graph = check(model, keep=["text_last", *keep]).graphs["main"][""]
        with torch.no_grad():
            out = model({"text_tokens": torch.ones(2, 3, 4), "row": torch.zeros(2)}, graph)
        assert ("text_mid" in out) == bool(keep) and "text_last" in out and "text_tokens" not in out
    assert seen == [True, False]


def test_two_programs_hand_keys_on() -> None:
    first = MetaModel(Net(), stream="text")
    second = MetaModel(Net(reads={"tokens": "text_hidden"}, writes={"hidden": "text_score"}), stream="text")
    score = {"score": Late(stream="text", reads={"hidden": "text_score"})}
    wiring = check_wiring(
        [Program("one", {"": first}, {"square": Square(stream="text")}), Program("two", {"": second}, score)], DATA
    )
    assert wiring.carried == {"one": (), "two": ("text_hidden",)} and wiring.warnings == []
    with pytest.raises(UserError, match="reads 'text_hidden'"):
        check_wiring([Program("two", {"": second}, score), Program("one", {"": first}, {"square": Square(stream="text")})], DATA)


class Judge(ReadWriteBlock):
    """Scores one input at inference, two in training."""

    outputs = ("fake", "real")
    optional_outputs = ("fake", "real")
    inference_outputs = ("fake",)

    def compute(self, hidden: Tensor, tokens: Tensor | None = None, *, outputs: Any) -> dict[str, Tensor]:
        values = {"fake": hidden.sum(-1), "real": None if tokens is None else tokens.sum(-1)}
        return {name: values[name] for name in outputs}


def test_parts_of_a_program_may_run_as_at_inference() -> None:
    """What a part writes in training alone is not there, and blocks that only training needs do not run."""
    noisy = Net(training_only=True, writes={"hidden": "text_noisy"})
    maker = MetaModel({"noise": noisy, "net": Net()}, stream="text")
    judge = MetaModel(Judge(writes=["fake", "real"]), stream="text")
    parts, kept = {"maker": maker, "judge": judge}, ("text_noisy",)
    losses = {"square": Late(stream="text", reads={"hidden": "text_fake"})}
    first = Program("first", parts, losses, inference=("judge",))
    second = Program("second", parts, {"square": Late(stream="text", reads={"hidden": "text_real"})}, inference=("maker",))
    wiring = check_wiring([first, second], DATA, kept)
    for part in parts.values():
        part.to("meta")
    rows = {(row.program, row.path): set(row.writes) for row in Trace(wiring, 2).rows if not row.path.startswith("loss.")}
    assert rows["first", "judge.preprocessor"] == {"text_fake"} and "text_real" in rows["second", "judge.preprocessor"]
    found = {name: [step.path for step in graphs["maker"].steps] for name, graphs in wiring.graphs.items()}
    assert found == {"first": ["preprocessor.noise", "preprocessor.net"], "second": ["preprocessor.net"]}
    data = {"text_tokens": torch.ones(2, 3, 4, device="meta")}
    out = judge(maker(data, wiring.graphs["first"]["maker"]), wiring.graphs["first"]["judge"])
    assert "text_fake" in out and "text_real" not in out and "text_noisy" in out
    with pytest.raises(UserError, match="reads 'text_real'"):
        check_wiring([Program("first", parts, second.losses, inference=("judge",))], DATA)


# ---- shapes and FLOPs ----------------------------------------------------------------------------------------------------


def trace(model: Any, losses: Any = None, rows: int = 5, data: Any = DATA) -> Trace:
    with torch.device("meta"):
        made = model()
    return Trace(check(made, losses, data=data), rows)


def test_the_key_table() -> None:
    table = {row.path: row for row in trace(chain).rows}
    assert list(table) == ["preprocessor.a", "trunk", "loss.square"]
    assert table["preprocessor.a"].reads == {"text_tokens": ((5, 3, 4), torch.float32)}
    assert table["trunk"].writes == {"text_hidden": ((5, 3, 4), torch.float32)}
    assert table["loss.square"].writes == {} and table["loss.square"].block == "Square"
    assert table["trunk"].flops == 2 * 15 * 16 and trace(chain).undeclared() == []


def test_a_block_that_fails_on_its_shapes_is_named() -> None:
    with pytest.raises(UserError, match=r"trunk \(Net\) fails on text_mid \(5, 3, 7\): RuntimeError"):
        trace(
            lambda: MetaModel(
                {"a": Net(width=7, writes={"hidden": "text_mid"})}, trunk=Net(reads={"tokens": "text_mid"}), stream="text"
            )
        )


def test_undeclared_flops_are_named() -> None:
    wrapped = lambda: MetaModel(Wrap(nn.Linear(4, 4), reads={"x": "text_tokens"}, writes={"y": "text_hidden"}))  # noqa: E731
    assert trace(wrapped).undeclared() == ["preprocessor (Wrap)"]
    assert trace(lambda: MetaModel(Frozen(wrapped()))).undeclared() == ["preprocessor (Frozen)"]


def test_flops_inside_frozen_parts_and_towers() -> None:
    data = DATA | {"image_tokens": KeySpec(torch.float32, ("N", 2, 4))}

    class Join(ReadWriteBlock):
        outputs = ("tokens",)

        def compute(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b.sum()

    def model() -> MetaModel:
        tower = Tower(
            MetaModel(Net(), trunk=Frozen(Net(reads={"tokens": "image_hidden"}, writes={"hidden": "image_out"})), stream="image"),
            dummy={"image_tokens": [2, 4]},
        )
        join = Join(reads={"a": "text_tokens", "b": "image_out"}, writes={"tokens": "joint_tokens"})
        return MetaModel({"tower": tower, "join": join}, trunk=Net(stream="joint"))

    made = trace(model, {"late": Late(stream="joint")}, data=data)
    assert {row.path: row.flops for row in made.rows}["preprocessor.tower"] == 2 * (2 * 2 * 2 * 16)
    text = {"text_tokens": torch.zeros(5, 3, 4), "text_label": torch.zeros(5), "row": torch.zeros(5)}

    def flops(batch: dict[str, Tensor]) -> dict[str, int]:
        found: dict[str, int] = {}
        for block, number in made.flops_by_block(batch):
            found[type(block).__name__] = found.get(type(block).__name__, 0) + number
        return found

    one = 2 * 2 * 16  # of one image in one Net
    trunk = 2 * 15 * 16
    assert flops(text | {"image_tokens": torch.zeros(7, 2, 4)}) == {"Net": 7 * one + trunk, "Frozen": 7 * one, "Join": 0}
    assert flops(text) == flops(text | {"image_tokens": torch.zeros(0, 2, 4)}) == {"Net": trunk, "Frozen": 0, "Join": 0}
