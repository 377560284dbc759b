"""Two updates, losses counted late, adaptive weights: equal to a loop written by hand, however the batch is split."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.errors import UserError
from l3m_like.data import Loader
from tests.distributed.recorder import Record, recorded, run_twice, toy, world_size
from tests.distributed.toys import VECTORS
from tests.parity.rule import check_gradients

TOYS = "tests.distributed.toys."
GAN: dict[str, Any] = {
    "data": VECTORS,
    "model": {
        "auto": {
            "_target_": "l3m_like.core.MetaModel",
            "stream": "data",
            "preprocessor": {"_target_": TOYS + "Encode"},
            "head": {"_target_": TOYS + "Decode"},
        },
        "critic": {"_target_": "l3m_like.core.MetaModel", "stream": "data", "head": {"_target_": TOYS + "Judge"}},
    },
    "loss": {
        "rebuild": {"_target_": TOYS + "Rebuild", "stream": "data"},
        "fool": {"_target_": TOYS + "Fool", "stream": "data", "weight": 0.3},
        "tell": {"_target_": TOYS + "Tell", "stream": "data"},
    },
    "updates": {
        "auto": {"params": ["auto.*"], "parts": ["auto", "critic"], "terms": ["rebuild", "fool"]},
        "critic": {"params": ["critic.*"], "parts": ["critic"], "terms": ["tell"], "optim": {"lr": 0.02}},
    },
}
SPLITS: list[dict[str, Any]] = [{}, {"micro": 4}, {"dp_shard": 2}, {"dp_shard": 2, "micro": 2}, {"dp_shard": 4}]


def gan(**updates: Mapping[str, Any]) -> dict[str, Any]:
    """The run above, with settings of its updates changed."""
    tree = copy.deepcopy(GAN)
    for name, settings in updates.items():
        tree["updates"][name] |= settings
    return tree


def run(tree: Mapping[str, Any], fault: Any = None, **settings: Any) -> list[Record]:
    return recorded(toy(tree, **settings), world_size(settings), fault=fault)


@functools.cache
def plain(adaptive: bool = False) -> Record:
    return run(gan(auto={"adaptive": ADAPTIVE} if adaptive else {}))[0]


def batches(tree: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    loader = Loader(toy(tree).instantiate("data.train"), seed=0, global_batch=8, micro_batch=8, prefetch=0)
    for _ in range(3):
        batch = loader.next_step().micro[0]
        yield {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


class ByHand(nn.Module):
    """The same model and loop, without the library: plain tensors, two optimizers."""

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.w = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(value.clone()) for name, value in start.items()})
        self.gradients: list[dict[str, Tensor]] = []
        self.terms: list[dict[str, float]] = []
        self.lambdas: list[float] = []

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}/weight"], self.w[f"{name}/bias"])

    def rebuild(self, x: Tensor) -> Tensor:
        return self.linear("auto/head/proj", torch.tanh(self.linear("auto/preprocessor/proj", x)))

    def judge(self, x: Tensor) -> Tensor:
        return self.linear("critic/head/score/2", torch.tanh(self.linear("critic/head/score/0", x))).squeeze(-1)

    def train_on(self, tree: Mapping[str, Any], adaptive: bool = False) -> ByHand:
        owned = {name: [p for key, p in self.w.items() if key.startswith(name)] for name in ("auto", "critic")}
        lr = {"auto": 0.01, "critic": 0.02}
        optimizers = {n: torch.optim.AdamW(owned[n], lr=lr[n], betas=(0.9, 0.95), weight_decay=0.0) for n in owned}
        for batch in batches(tree):
            x, kept = batch["data_x"], batch["data_kept"]
            recon = self.rebuild(x)
            rebuild, fool = (recon - x).square()[kept].mean(), -self.judge(recon).mean()
            scale = 1.0
            if adaptive:
                weight = self.w["auto/head/proj/weight"]
                a, b = (torch.autograd.grad(term, weight, retain_graph=True)[0].norm() for term in (rebuild, fool))
                scale = float((a / (b + 1e-6)).clamp(0, 50.0))
                self.lambdas.append(scale)
            self._step("auto", rebuild + scale * 0.3 * fool, owned, optimizers)
            real, fake = self.judge(x), self.judge(recon.detach())  # of the autoencoder before its step
            tell = (F.softplus(fake) + F.softplus(-real)).mean()
            self._step("critic", tell, owned, optimizers)
            self.terms.append({"loss/rebuild": rebuild.item(), "loss/fool": fool.item(), "loss/tell": tell.item()})
        return self

    def _step(self, name: str, loss: Tensor, owned: Any, optimizers: Any) -> None:
        gradients = torch.autograd.grad(loss, owned[name])
        names = [key.replace("/", ".") for key in self.w if key.startswith(name)]
        self.gradients.append(dict(zip(names, gradients, strict=True)))
        scale = min(1.0, 0.1 / (float(torch.cat([g.flatten() for g in gradients]).norm()) + 1e-6))
        for p, g in zip(owned[name], gradients, strict=True):
            p.grad = g * scale
        optimizers[name].step()


def compare(found: list[Record], gradients: list[dict[str, Tensor]], final: Mapping[str, Tensor]) -> None:
    for record in found:
        assert len(record.gradients) == len(gradients)
        for ours, theirs in zip(record.gradients, gradients, strict=True):
            check_gradients(ours, theirs)
        for name, value in final.items():
            torch.testing.assert_close(record.final[name], value, rtol=1e-9, atol=1e-11)


# ---- two updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SPLITS, ids=str)
def test_two_updates_equal_a_loop_by_hand(settings: dict[str, Any]) -> None:
    """Each update's gradients hold its own parameters alone; the critic sees the reconstruction from before the other's step."""
    found = run(gan(), **settings) if settings else [plain()]
    theirs = ByHand(plain().start).train_on(gan())
    compare(found, theirs.gradients, {name.replace("/", "."): p.detach() for name, p in theirs.w.items()})
    for ours, terms in zip(found[0].rows, theirs.terms, strict=True):
        for name, value in terms.items():
            assert ours[name] == pytest.approx(value, rel=1e-9)
    assert [set(step) for step in found[0].gradients[:2]] == [
        {name for name in plain().weights if name.startswith(update)} for update in ("auto.", "critic.")
    ]


def test_an_update_that_does_not_run_changes_nothing() -> None:
    tree = gan(critic={"start": 1, "every": 2})
    for settings in ({}, {"dp_shard": 2}):
        record = run(tree, **settings)[0]
        updates = ["auto" if "auto.head.proj.bias" in step else "critic" for step in record.gradients]
        assert updates == ["auto", "auto", "critic", "auto"]  # steps 0, 1 (both), 2
        assert all(float(value) == 1.0 for name, value in record.state["critic"].items() if name.endswith(".step"))
        assert all(float(value) == 3.0 for name, value in record.state["auto"].items() if name.endswith(".step"))
    never = run(gan(critic={"start": 3}), dp_shard=2)[0]
    for name, value in never.state["critic"].items():
        assert not value.any(), name
    for name in never.start:
        assert torch.equal(never.start[name], never.final[name]) == name.startswith("critic."), name


def test_a_term_may_begin_later() -> None:
    """Before its start it is no part of the loss, and what only it reads does not run."""
    from l3m_like.training.train import plan

    tree = gan()
    tree["loss"]["fool"] = tree["loss"]["fool"] | {"start": 2}
    found = [run(tree, **settings)[0] for settings in ({}, {"dp_shard": 2})]
    for record in found:
        assert ["loss/fool" in row for row in record.rows if "loss" in row] == [False, False, True]
        check_gradients(record.gradients[-1], found[0].gradients[-1])
    auto = plan(toy(tree), 1).updates[0]
    assert auto._needed(1) == (["auto"], {"rebuild": auto.losses["rebuild"]})
    assert auto._needed(2) == (["auto", "critic"], dict(auto.losses))
    without = gan()
    del without["loss"]["fool"]
    without["updates"]["auto"]["terms"] = ["rebuild"]
    for name, value in run(without)[0].gradients[0].items():
        assert torch.equal(found[0].gradients[0][name], value), name


def test_what_begins_when_is_checked() -> None:
    from l3m_like.training.train import plan

    tree = gan()
    tree["loss"]["tell"] = tree["loss"]["tell"] | {"start": 1}
    with pytest.raises(UserError, match="its first term with a weight starts at 1"):
        plan(toy(tree), 1)
    with pytest.raises(UserError, match="updates.auto.inference: 'critc' is none of its parts. Did you mean 'critic'"):
        plan(toy(gan(auto={"inference": ["critc"]})), 1)


def test_updates_that_leave_gaps_are_refused() -> None:
    from l3m_like.training.train import plan

    with pytest.raises(UserError, match="none of them runs at every step"):
        plan(toy(gan(auto={"every": 2}, critic={"every": 2})), 1)
    with pytest.raises(UserError, match="critic reads 'data_recon' of updates.auto, which does not run at all of its"):
        plan(toy(gan(auto={"start": 1})), 1)


def test_a_loss_owns_no_tensor() -> None:
    from l3m_like.training.train import plan

    tree = gan()
    tree["loss"]["rebuild"]["_target_"] = TOYS + "WithWeights"
    with pytest.raises(UserError, match="loss.rebuild holds the tensor 'net.weight'.*Frozen"):
        plan(toy(tree), 1)


@pytest.mark.parametrize("settings", [{}, {"dp_shard": 2}], ids=str)
def test_two_updates_resume(settings: dict[str, Any]) -> None:
    """Stopped after two of three steps and started again: the same run, bit by bit."""
    whole = run(gan(), **settings) if settings else [plain()]
    for record, reference in zip(recorded(toy(gan(), **settings), world_size(settings), task=run_twice), whole, strict=True):
        assert len(record.gradients) == 2  # one step, two updates
        for name, value in reference.final.items():
            assert torch.equal(record.final[name], value), name
        for update, state in reference.state.items():
            for name, value in state.items():
                assert torch.equal(record.state[update][name], value), name
        assert record.column("loss") == reference.column("loss")


@contextmanager
def all_trained() -> Iterator[None]:
    from l3m_like.training.updates import Update

    with mock.patch.object(Update, "train_only_own", lambda self, updates: None):
        yield


@contextmanager
def handed_on_late() -> Iterator[None]:
    """The critic would see what the autoencoder makes after its step: here, simply something else."""
    from l3m_like.training.updates import Update

    forward_backward = Update.forward_backward

    def broken(self: Any, *args: Any) -> Any:
        terms, kept = forward_backward(self, *args)
        return terms, {key: value * 1.001 for key, value in kept.items()}

    with mock.patch.object(Update, "forward_backward", broken):
        yield


@pytest.mark.parametrize("fault", [all_trained, handed_on_late])
@pytest.mark.parametrize("settings", [{}, {"dp_shard": 2}], ids=str)
def test_planted_faults_are_found(fault: Any, settings: dict[str, Any]) -> None:
    theirs = ByHand(plain().start).train_on(gan())
    with pytest.raises(AssertionError):
        compare(run(gan(), fault, **settings), theirs.gradients, {})


# ---- adaptive weights ----------------------------------------------------------------------------------------------------


class Alone:
    """The mesh of a rank that hears of no other."""

    def sum(self, value: Tensor) -> Tensor:
        return value


ADAPTIVE = {"term": "fool", "against": ["rebuild"], "at": "auto.head.proj", "max": 50.0}


@pytest.mark.parametrize("settings", [{}, {"dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 2}], ids=str)
def test_adaptive_weight_is_that_of_the_whole_batch(settings: dict[str, Any]) -> None:
    theirs = ByHand(plain(True).start).train_on(gan(), adaptive=True)
    assert len({round(value, 6) for value in theirs.lambdas}) == 3 and max(theirs.lambdas) < 50
    found = run(gan(auto={"adaptive": ADAPTIVE}), **settings) if settings else [plain(True)]
    compare(found, theirs.gradients, {})


@contextmanager
def weight_of_one_rank() -> Iterator[None]:
    from l3m_like.training.updates import AdaptiveWeight

    weight = AdaptiveWeight.weight
    with mock.patch.object(AdaptiveWeight, "weight", lambda self, terms, mesh: weight(self, terms, Alone())):
        yield


def test_adaptive_weight_of_one_rank_is_found() -> None:
    theirs = ByHand(plain(True).start).train_on(gan(), adaptive=True)
    with pytest.raises(AssertionError, match="against"):
        compare(run(gan(auto={"adaptive": ADAPTIVE}), weight_of_one_rank, dp_shard=2), theirs.gradients, {})


def test_adaptive_weight_is_finite_where_a_gradient_is_zero() -> None:
    from l3m_like.training.updates import AdaptiveWeight

    layer = nn.Linear(3, 2)
    balance = AdaptiveWeight("fool", ["rebuild"], "layer", 10.0)
    layer.register_forward_hook(balance._remember)
    out = layer(torch.randn(5, 3))
    some, none, apart = out.square().sum(), out.sum() * 0.0, torch.ones((), requires_grad=True).exp()
    assert balance.weight({"rebuild": some, "fool": none}, Alone()) == 10.0  # clamped, not infinite
    assert balance.weight({"rebuild": none, "fool": some}, Alone()) == 0.0
    assert balance.weight({"rebuild": none, "fool": none}, Alone()) == 0.0
    assert balance.weight({"rebuild": some, "fool": apart}, Alone()) == 10.0  # does not see the layer
    assert balance.weight({"rebuild": some, "fool": torch.ones(())}, Alone()) == 10.0  # has no gradient at all
    weight = balance.weight({"rebuild": some, "fool": out.sum()}, Alone())
    gradients = [torch.autograd.grad(term, layer.weight, retain_graph=True)[0].norm() for term in (some, out.sum())]
    torch.testing.assert_close(weight, gradients[0] / (gradients[1] + 1e-6))


def test_adaptive_weight_in_a_checkpointed_unit() -> None:
    """Its backward pass runs the layer, and what remembers its output, once more."""
    from torch.utils.checkpoint import checkpoint

    from l3m_like.training.updates import AdaptiveWeight

    layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    balance = AdaptiveWeight("fool", ["rebuild"], "layer", 10.0)
    layer.register_forward_hook(balance._remember)

    def weight(run: Any) -> Tensor:
        out = run(lambda x: layer(x).sigmoid())
        return balance.weight({"rebuild": out.square().sum(), "fool": out.sum()}, Alone())

    torch.testing.assert_close(weight(lambda unit: checkpoint(unit, x, use_reentrant=False)), weight(lambda unit: unit(x)))


def test_adaptive_weight_refuses_a_compiled_unit() -> None:
    from l3m_like.distributed.compiled import Graphs
    from l3m_like.training.updates import AdaptiveWeight

    part = nn.ModuleDict({"unit": nn.Sequential(nn.Linear(3, 3)), "head": nn.Linear(3, 2)})
    Graphs().compile([part["unit"]])
    for at in ("unit.0", "head"):
        balance = AdaptiveWeight("fool", ["rebuild"], at, 10.0)
        balance.attach({"": part})  # type: ignore[dict-item]
        with pytest.raises(UserError, match="'unit.0' lies in a compiled unit") if at == "unit.0" else nullcontext():
            balance.check("main", [part])


@pytest.mark.parametrize(
    ("adaptive", "message"),
    [
        ({"at": "auto.head.prj"}, "Did you mean 'auto.head.proj'"),
        ({"term": "fol"}, "Did you mean 'fool'"),
        ({"against": ["tell"]}, "no term 'tell'"),
    ],
)
def test_adaptive_weight_refuses_wrong_names(adaptive: dict[str, Any], message: str) -> None:
    from l3m_like.training.train import plan

    with pytest.raises(UserError, match=message):
        plan(toy(gan(auto={"adaptive": ADAPTIVE | adaptive})), 1)


# ---- what cannot be split ------------------------------------------------------------------------------------------------


def late(loss: str) -> dict[str, Any]:
    """An autoencoder whose mask, and so its count, is drawn in the model."""
    return {
        "data": VECTORS,
        "model": GAN["model"]["auto"]
        | {"preprocessor": {"mask": {"_target_": TOYS + "DrawMask"}, "encode": {"_target_": TOYS + "Encode"}}},
        "loss": {"late": {"_target_": TOYS + loss, "stream": "data"}},
    }


@pytest.mark.parametrize("settings", [{"dp_shard": 2}, {"dp_shard": 4}, {"tp": 2}], ids=str)
def test_a_late_count_is_global(settings: dict[str, Any]) -> None:
    alone = run(late("LateRebuild"))[0]
    found = run(late("LateRebuild"), **settings)
    compare(found, alone.gradients, alone.final)
    assert found[0].column("loss") == pytest.approx(alone.column("loss"), rel=1e-9)
    # by hand: the first step
    batch = next(batches(GAN))
    from l3m_like.core.random import uniform

    drawn = uniform(batch["row"], (6,), seed=0, purpose="mask") < 0.4
    w = alone.start
    code = torch.tanh(F.linear(batch["data_x"], w["preprocessor.encode.proj.weight"], w["preprocessor.encode.proj.bias"]))
    recon = F.linear(code, w["head.proj.weight"], w["head.proj.bias"])
    assert alone.column("loss")[0] == pytest.approx(float((recon - batch["data_x"]).square()[drawn].mean()), rel=1e-9)


@contextmanager
def local_count() -> Iterator[None]:
    from l3m_like.losses import Loss

    term = Loss.term
    with mock.patch.object(Loss, "term", lambda self, data, total, mesh=None: term(self, data, total, None)):
        yield


def test_a_late_count_of_one_rank_is_found() -> None:
    alone = run(late("LateRebuild"))[0]
    with pytest.raises(AssertionError, match="against"):
        compare(run(late("LateRebuild"), local_count, dp_shard=2), alone.gradients, {})


def test_what_cannot_be_split_is_refused_when_it_would_be() -> None:
    from l3m_like.training.train import plan

    with pytest.raises(UserError, match="loss.late counts in the forward.*2 micro-batches.*batch.micro"):
        plan(toy(late("LateRebuild"), micro=4), 1)
    plan(toy(late("LateRebuild"), micro=4), 2)  # one micro-batch per rank
    with pytest.raises(UserError, match="adaptive needs the gradient of the whole batch"):
        plan(toy(gan(auto={"adaptive": ADAPTIVE}), micro=4), 1)


# ---- which parameters belong where ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"critic": {"params": ["crtic.*"]}}, "matches no parameter"),
        ({"critic": {"params": ["*.proj.*", "critic.*"]}}, "in the updates 'auto' and 'critic'"),
        ({"critic": {"params": ["critic.head.score.0.*"]}}, "'critic.head.score.2.weight' is in no update"),
        ({"critic": {"parts": ["critc"]}}, "Did you mean 'critic'"),
        ({"critic": {"terms": ["fool"]}}, "the term 'fool' is in 'auto' and in 'critic'"),
        ({"auto": {"terms": ["rebuild"]}}, "loss.fool is in no update"),
    ],
)
def test_every_parameter_and_term_has_one_update(updates: dict[str, Any], message: str) -> None:
    from l3m_like.training.train import plan
    from l3m_like.training.updates import assign_parameters

    with pytest.raises(UserError, match=message):
        made = plan(toy(gan(**updates)), 1)
        assign_parameters(made.updates, dict(made.model.named_parameters()))
