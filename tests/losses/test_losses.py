"""Losses: sums, counts, and that splitting a batch changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from l3m_like.core.errors import UserError
from l3m_like.losses import FlowMatching, Loss, TokenNLL


class OneProcess:
    """The one method of a mesh that a loss calls."""

    def __init__(self) -> None:
        self.summed = 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.summed += 1
        return values.mul_(2)  # in place, as an all-reduce over two ranks with equal values


def token_data() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 7, (4, 6), generator=generator)
    targets[:2, 1:] = -100  # rows of unequal weight: a mean of means would differ
    logits = torch.randn(4, 6, 7, generator=generator)
    nll = F.cross_entropy(logits.mT, targets, reduction="none", ignore_index=-100)
    return {"text_nll": nll, "text_targets": targets, "logits": logits}


def test_token_nll_is_the_mean_over_all_targets_however_the_batch_is_split() -> None:
    loss, data = TokenNLL(stream="text"), token_data()
    expected = F.cross_entropy(data["logits"].mT, data["text_targets"], ignore_index=-100)
    for size in (1, 2, 4):
        micro = [{key: value[i : i + size] for key, value in data.items()} for i in range(0, 4, size)]
        total = sum(loss.count_of(m) for m in micro)
        torch.testing.assert_close(sum(loss.term(m, float(total), None)[0] for m in micro) / total, expected)
    assert total.dtype == torch.int64 and total == 14
    assert loss.compute(torch.tensor([[3.0, 0.0]], dtype=torch.bfloat16), torch.tensor([[1, -100]])).dtype == torch.float32
    # what stands elsewhere than at a source's targets does not count for it
    only = torch.tensor([[True, True, False]])
    assert loss.compute(torch.full((1, 3), 3.0), torch.tensor([[1, -100, 2]]), only) == 3.0
    assert loss.compute(torch.ones(1, 2, dtype=torch.float64), torch.zeros(1, 2)).dtype == torch.float64


def test_flow_matching() -> None:
    loss = FlowMatching(stream="image", reads={"image": "photo"})
    generator = torch.Generator().manual_seed(0)
    prediction, velocity = torch.randn(2, 4, 1, 3, 3, generator=generator).unbind()
    data = {"image_prediction": prediction.bfloat16(), "image_target": velocity, "photo": velocity}
    data["image_flow_weight"] = torch.ones(4)
    assert loss.reads == {port: f"image_{port}" for port in ("prediction", "target", "flow_weight", "only")}
    assert loss.count_reads == {"image": "photo"}
    count = loss.count_of(data)
    assert count == 36 and count.dtype == torch.int64
    value, denominator = loss.term(data, float(count), None)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value / denominator, F.mse_loss(prediction.bfloat16().float(), velocity))
    with pytest.raises(UserError, match="equal shapes"):
        loss.compute(prediction, velocity[:1], torch.ones(4))
    only = torch.tensor([True, False, True, False])
    metric = loss.over("from_web")
    assert metric is not None and metric.weight is None and metric.count_reads == {"image": "photo", "only": "from_web"}
    data["from_web"] = only
    assert metric.count_of(data) == 18
    expected = F.mse_loss(prediction.bfloat16().float()[only], velocity[only])
    torch.testing.assert_close(metric.term(data, 18.0, None)[0] / 18, expected)


def test_unmapped_count_ports_follow_the_stream() -> None:
    assert TokenNLL(stream="text").count_reads == {"targets": "text_targets"}
    assert TokenNLL(stream="text", reads={"targets": "labels"}).count_reads == {"targets": "labels"}
    loss = TokenNLL()
    loss.set_stream("speech")
    assert loss.count_reads == {"targets": "speech_targets"} and loss.reads["nll"] == "speech_nll"
    metric = loss.over("speech_from_web")
    assert metric is not None and metric.over("speech_from_code") is None  # one source, or all
    data = {
        "speech_nll": torch.tensor([[1.0, 0.0, 4.0]]),
        "speech_targets": torch.tensor([[5, -100, 6]]),
        "speech_from_web": torch.tensor([[False, True, True]]),
    }
    assert metric.count_of(data) == 1 and metric.term(data, 1.0, None)[0] == 4.0 and loss.term(data, 2.0, None)[0] == 5.0


def test_late_count() -> None:
    class Masked(Loss):
        """Mean over a mask that a block of the model drew."""

        count_late = True

        def compute(self, error: torch.Tensor, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (error * masked).sum(), masked.sum()

    loss, mesh = Masked(), OneProcess()
    data = {"error": torch.tensor([1.0, 2.0, 4.0]), "masked": torch.tensor([1.0, 0.0, 1.0])}
    assert loss.count_reads == {}
    value, count = loss.term(data, None, mesh)
    assert (value, count, mesh.summed) == (5.0, 4.0, 1)
    value, count = loss.term(data, None)
    assert (value, count) == (5.0, 2.0)
    nothing = data | {"masked": torch.zeros(3)}
    # one rank may have nothing to count: 0 of its own, but never a division by 0
    assert loss.term(nothing, None)[1] == 0.0 and loss.term(nothing, None, mesh)[1] == 1.0


def test_weight() -> None:
    assert TokenNLL().weight == 1.0 and TokenNLL(weight=None).weight is None
    with pytest.raises(UserError, match="finite"):
        TokenNLL(weight=float("nan"))


def test_a_loss_without_a_count_is_refused_when_it_is_built() -> None:
    class Uncounted(Loss):
        def compute(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum()

    with pytest.raises(UserError, match="count_late"):
        Uncounted()
    with pytest.raises(UserError, match="no read port 'target'"):
        TokenNLL(reads={"target": "x"})
