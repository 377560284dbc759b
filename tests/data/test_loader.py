"""Lanes and loaders: the stream depends on the data, the seed, the global batch and the lanes, and on nothing else."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec
from l3m_like.data import (
    ConcatPack,
    Cost,
    Dataset,
    EvalLoader,
    FitPack,
    JsonLines,
    JsonLinesStream,
    Loader,
    Mix,
    OnePerRow,
    Order,
    Stack,
    Tokenize,
)
from l3m_like.data.lanes import default_lanes

GLOBAL = 8
STEPS = 9  # some lanes cross the first epoch's end at step 3


class Numbers:
    """Samples {"value": index, "draw": uniform of the visit}: one row each."""

    path = "numbers"

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def read(self, index: int) -> dict[str, Any]:
        if index == 1000:
            raise ValueError("broken")
        return {"value": index}

    def reference(self, index: int) -> str:
        return f"numbers#{index}"


class Draw:
    def keys(self) -> dict[str, KeySpec]:
        return {"value": KeySpec(torch.int64, ()), "draw": KeySpec(torch.float64, ())}

    def check(self) -> None: ...

    def __call__(self, sample: dict[str, Any], visit: Any) -> dict[str, np.ndarray]:
        return {"value": np.array(sample["value"]), "draw": np.array(visit.uniform("draw"))}


class Shards:
    """A stream of documents: shard i holds ``counts[i]`` of them."""

    path = "shards"

    def __init__(self, counts: tuple[int, ...] = (7, 0, 12, 5, 9), longest: int = 60) -> None:
        self.counts = counts
        self.longest = longest

    def shards(self) -> list[str]:
        return [f"shard-{i}" for i in range(len(self.counts))]

    def open(self, shard: int, skip: int) -> Any:
        for n in range(skip, self.counts[shard]):
            size = (shard * 31 + n * 17) % self.longest
            yield f"shard-{shard}#{n}", {"text": chr(65 + (shard * 7 + n) % 50) * size, "value": 100 * shard + n}


def numbers(samples: int = 21) -> Dataset:
    return Dataset(Numbers(samples), Draw(), Stack())


def bytes_of(longest: int = 60) -> Tokenize:
    return Tokenize("bytes", vocab_size=257)


KINDS = (
    *("numbers", "text", "best", "first", "cost", "split", "one", "drop"),
    *("stream", "few", "unshuffled", "mixed", pytest.param("mixed_numbers", marks=pytest.mark.slow)),
)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 documents of 0 to 60 bytes."""
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    sizes = np.random.default_rng(0).integers(0, 60, 40)
    path.write_text("".join(json.dumps({"text": chr(65 + i % 50) * int(n)}) + "\n" for i, n in enumerate(sizes)))
    return str(path)


@pytest.fixture(scope="module")
def text(documents: str) -> Dataset:
    """These in rows of 32 tokens with at most 3 documents."""
    return Dataset(JsonLines(documents), Tokenize("bytes", vocab_size=257), ConcatPack(32, max_documents=3))


@pytest.fixture(scope="module")
def make(documents: str) -> Any:
    """``make(kind)``: each kind of source, mixture and packing."""

    def made(kind: str) -> Dataset:
        tokens, lines = Tokenize("bytes", vocab_size=257), JsonLines(documents)
        return {
            "numbers": lambda: numbers(),
            "text": lambda: Dataset(lines, tokens, ConcatPack(32, max_documents=3)),
            "best": lambda: Dataset(lines, tokens, FitPack(64, "best", buffer=5)),
            "first": lambda: Dataset(lines, tokens, FitPack(64, "first", buffer=5)),
            "cost": lambda: Dataset(lines, tokens, FitPack(64, buffer=5, cost=Cost(squared=0.1), max_cost=450.0)),
            "split": lambda: Dataset(lines, tokens, FitPack(32, buffer=4, too_long="split")),
            "one": lambda: Dataset(lines, tokens, OnePerRow(32, too_long="split")),
            "drop": lambda: Dataset(lines, tokens, FitPack(32, buffer=4, too_long="drop")),
            "stream": lambda: Dataset(Shards(tuple(range(3, 20))), tokens, ConcatPack(32, max_documents=3), block=4),
            "few": lambda: Dataset(Shards((9, 30)), tokens, FitPack(64, buffer=3), block=3),  # fewer shards than lanes
            "unshuffled": lambda: Dataset(Shards(), tokens, ConcatPack(32), shuffle=False),
            "mixed": lambda: Dataset(
                {"a": lines, "b": Shards((9, 30)), "c": JsonLines(documents)},
                tokens,
                FitPack(64, buffer=4),
                Mix({"a": 3, "b": 1, "c": 0.5}, epochs={"c": 2}, ends="last"),
                block=2,
            ),
            "mixed_numbers": lambda: Dataset(
                {"a": Numbers(21), "b": Numbers(5)}, Draw(), Stack(), Mix({"a": 3, "b": 1}, by="samples")
            ),
        }[kind]()

    return made


def run(dataset: Dataset, steps: int, *, dp: int = 1, accumulation: int = 1, workers: int = 0, state=None, **kwargs) -> dict:
    """The global stream: {key: [steps * GLOBAL, ...]}, "refs", and "state" merged after each step."""
    loaders = [
        Loader(
            dataset,
            seed=7,
            global_batch=GLOBAL,
            micro_batch=GLOBAL // dp // accumulation,
            dp_rank=rank,
            dp_size=dp,
            workers=workers,
            state=state,
            prefetch=2 if workers else 0,
            **kwargs,
        )
        for rank in range(dp)
    ]
    stream: dict[str, list] = {"refs": [], "state": []}
    for _ in range(steps):
        parts = [loader.next_step() for loader in loaders]
        merged: dict[str, Any] = {}
        for part in parts:
            assert len(part.micro) == accumulation
            merged |= part.state
            stream["refs"] += part.refs
            for batch in part.micro:
                for key, value in batch.items():
                    if key != "text_cu_seqlens":
                        stream.setdefault(key, []).append(value)
        stream["state"].append(json.loads(json.dumps(merged)))
    for loader in loaders:
        loader.close()
    return {key: torch.cat(value) if isinstance(value[0], torch.Tensor) else value for key, value in stream.items()}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


@pytest.mark.parametrize("kind", KINDS)
def test_stream_is_the_same_on_any_split(kind: str, make: Any) -> None:
    reference = run(make(kind), STEPS)
    assert torch.equal(reference["row"], torch.arange(STEPS * GLOBAL))
    for dp in (1, 2, 4):
        for accumulation in (1, 2):
            for workers in (0, 1, 3):
                assert_same(reference, run(make(kind), STEPS, dp=dp, accumulation=accumulation, workers=workers))


def resumed(kind: str, make: Any, stop: int, before: tuple, after: tuple, **settings: Any) -> dict:
    first = run(make(kind), stop, dp=before[0], accumulation=before[1], workers=before[2])
    split = {"dp": after[0], "accumulation": after[1], "workers": after[2]}
    rest = run(make(kind), STEPS - stop, **split, state=first["state"][-1], **settings)
    return {k: torch.cat([first[k], rest[k]]) if isinstance(v, torch.Tensor) else first[k] + rest[k] for k, v in first.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_resume_on_another_split(kind: str, make: Any) -> None:
    """Stopped at every step, also across the borders of epochs, on other numbers of processes, micro-batches and workers."""
    whole = run(make(kind), STEPS)
    splits = [(dp, accumulation, workers) for dp in (1, 2, 4) for accumulation in (1, 2) for workers in (0, 1, 3)]
    for stop in range(1, STEPS):
        before, after = splits[stop * 7 % len(splits)], splits[stop * 11 % len(splits)]
        assert_same(whole, resumed(kind, make, stop, before, after))


@pytest.mark.parametrize("kind", KINDS)
def test_resume_with_another_batch_size(kind: str, make: Any) -> None:
    """Lanes define the stream: after 3 steps of 8 rows, steps of 16 rows are the same lanes' next rows."""
    whole = run(make(kind), 7, lanes=8)
    first = run(make(kind), 3, lanes=8)
    loader = Loader(
        make(kind), seed=7, global_batch=16, micro_batch=4, lanes=8, state=first["state"][-1], prefetch=0, step=3, workers=0
    )
    for number in (3, 4):
        step = loader.next_step()
        assert step.number == number
        rows = torch.cat([batch["row"] for batch in step.micro])
        assert rows.tolist() == list(range(24 + (number - 3) * 16, 40 + (number - 3) * 16))
        for lane in range(8):
            for turn in range(2):
                old = (number - 3) * 2 + 3 + turn
                assert step.refs[lane * 2 + turn] == whole["refs"][old * 8 + lane]
    loader.close()


def test_the_test_sees_a_wrong_state(make: Any) -> None:
    """Planted faults: a state that forgets the carried tail, the buffer, the mixture's count or the stream's place."""
    for kind, forget in {
        "text": lambda lane: {"pack": lane["pack"] | {"offset": 0}},
        "best": lambda lane: {"pack": {"waiting": lane["pack"]["waiting"][1:]}},
        "mixed": lambda lane: {"given": dict.fromkeys(lane["given"], 0)},
        "stream": lambda lane: {"feeds": {"": lane["feeds"][""] | {"skip": 0, "turn": lane["feeds"][""]["turn"] + 1}}},
        "numbers": lambda lane: {"taken": {"": lane["taken"][""] + 1}},
    }.items():
        whole = run(make(kind), STEPS)
        broken = {number: lane | forget(lane) for number, lane in whole["state"][2].items()}
        assert broken != whole["state"][2]
        rest = run(make(kind), STEPS - 3, state=broken)
        assert whole["refs"][3 * GLOBAL :] != rest["refs"], kind


def test_state_is_of_the_step_handed_out_not_of_the_prefetched() -> None:
    loader = Loader(numbers(), seed=7, global_batch=GLOBAL, micro_batch=GLOBAL, prefetch=4)
    assert [loader.next_step().state["0"]["taken"][""] for _ in range(4)] == [1, 2, 3, 4]
    loader.close()


def test_an_epoch_is_a_permutation_and_epochs_differ() -> None:
    values = run(numbers(24), 6)["value"]
    first, second = values[:24], values[24:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(24))
    assert first.tolist() != list(range(24)) and first.tolist() != second.tolist()


def test_order_is_fixed_for_ever() -> None:
    """The same numbers on every machine and version: a change here breaks every saved run."""
    assert Order(8, seed=0).epoch(0).tolist() == [0, 2, 4, 1, 5, 7, 6, 3]
    far = Order(10**12, seed=3, name="web").at(np.array([0, 10**12 - 1, 5 * 10**12 + 7]))[1]
    assert far.tolist() == [255328660110, 445787358637, 649359224741]


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 64, 1000, 4097])
def test_every_epoch_is_a_permutation(samples: int) -> None:
    epochs = [Order(samples, seed=1).epoch(number) for number in range(3)]
    assert all(sorted(epoch.tolist()) == list(range(samples)) for epoch in epochs)
    if samples > 7:
        assert len({tuple(epoch) for epoch in epochs}) == 3
        assert tuple(Order(samples, seed=2).epoch(0)) != tuple(epochs[0]) != tuple(Order(samples, seed=1, name="b").epoch(0))


def test_the_order_is_random_enough() -> None:
    """Over many epochs every sample comes first equally often, and neighbours are not correlated."""
    epochs = np.stack([Order(12, seed=0).epoch(number) for number in range(6000)])
    for place in (0, 5, 11):
        counts = np.bincount(epochs[:, place], minlength=12)
        assert ((counts - 500) ** 2 / 500).sum() < 31.3  # chi-square of 11 degrees of freedom at 0.999
    pairs = np.bincount(epochs[:, 0] * 12 + epochs[:, 1], minlength=144)[~np.eye(12, dtype=bool).ravel()]
    assert ((pairs - 6000 / 132) ** 2 / (6000 / 132)).sum() < 187  # 131 degrees of freedom
    long = Order(100_000, seed=0).epoch(0)
    assert abs(np.corrcoef(long[:-1], long[1:])[0, 1]) < 0.01 and abs(np.corrcoef(long, np.arange(100_000))[0, 1]) < 0.01


def test_draws_belong_to_sample_and_epoch() -> None:
    stream = run(numbers(24), 6)
    draws = {(int(v), i // 24): float(d) for i, (v, d) in enumerate(zip(stream["value"], stream["draw"], strict=True))}
    assert len(set(draws.values())) == 48  # no two visits share a draw


# ---- packing -----------------------------------------------------------------------------------------------------------


def documents_of(dataset: Dataset) -> list[list[int]]:
    return [dataset.item(index).data["ids"].tolist() for index in range(len(dataset))]


def check_rows(batch: dict[str, torch.Tensor], max_documents: int) -> None:
    """ids, targets, positions, document_ids and cu_seqlens say the same."""
    ids, targets, positions, documents = (batch[f"text_{k}"] for k in ("ids", "targets", "positions", "document_ids"))
    rows, length = ids.shape
    borders = batch["text_cu_seqlens"]
    assert borders.shape == (rows * (max_documents + 1) + 1,) and borders.dtype == torch.int32
    assert borders[0] == 0 and borders[-1] == rows * length and (borders.diff() >= 0).all()
    real = borders[: int((borders < rows * length).sum())].tolist()
    expected = []
    for row in range(rows):
        for at in range(length):
            begins = at == 0 or documents[row, at] != documents[row, at - 1]
            if begins:
                expected.append(row * length + at)
            if documents[row, at] < 0:
                assert targets[row, at] == -100
                continue
            assert positions[row, at] == (0 if begins else positions[row, at - 1] + 1)
            ends = at + 1 == length or documents[row, at + 1] != documents[row, at]
            if not ends:
                assert targets[row, at] == ids[row, at + 1]
            elif at + 1 < length:
                assert targets[row, at] == -100
            if ids[row, at] == 256:
                assert targets[row, at] == -100 and ends
    assert real == expected


def test_an_epoch_of_packs_loses_no_byte(text: Dataset) -> None:
    rows = [batch for batch, _ in EvalLoader(text, batch=5)]
    ids = torch.cat([b["text_ids"] for b in rows]).flatten()
    kept = torch.cat([b["text_document_ids"] for b in rows]).flatten() >= 0
    everything = [token for document in documents_of(text) for token in document]
    assert ids[kept].tolist() == everything
    targets = torch.cat([b["text_targets"] for b in rows]).flatten()
    assert targets[targets != -100].tolist() == [token for document in documents_of(text) for token in document[1:]]
    for batch in rows:
        check_rows(batch, 3)


@pytest.mark.parametrize("packed", [False, True])
def test_a_limit_is_of_rows_whatever_the_batch(text: Dataset, packed: bool) -> None:
    dataset = text if packed else Dataset(Numbers(11), Draw(), Stack())
    key = "text_ids" if packed else "value"
    first = torch.cat([batch[key] for batch, _ in EvalLoader(dataset, batch=5)])[:7]
    for batch, dp in ((2, 1), (5, 1), (7, 2), (3, 2)):
        loaders = [list(EvalLoader(dataset, batch=batch, limit=7, dp_rank=rank, dp_size=dp)) for rank in range(dp)]
        assert len({len(batches) for batches in loaders}) == 1
        dealt = [found for turn in zip(*loaders, strict=True) for found, valid in turn if valid]
        assert torch.equal(torch.cat([found[key] for found in dealt]), first)


def test_lanes_lose_no_byte_and_rows_are_consistent(text: Dataset) -> None:
    """Each lane's tokens are its documents in order, across rows and epochs."""
    stream = run(text, STEPS)
    order, documents = Order(len(text), 7), documents_of(text)
    taken = order.at(np.arange(100 * GLOBAL))[1]
    for lane in range(GLOBAL):
        rows = slice(lane, None, GLOBAL)
        tokens = stream["text_ids"][rows].flatten()[stream["text_document_ids"][rows].flatten() >= 0].tolist()
        expected: list[int] = []
        for k in range(100):
            expected += documents[taken[lane + k * GLOBAL]]
        assert tokens == expected[: len(tokens)]
    loader = Loader(text, seed=7, global_batch=GLOBAL, micro_batch=4)
    for batch in loader.next_step().micro:
        check_rows(batch, 3)
    loader.close()


def test_targets_never_cross_documents(tmp_path: Path) -> None:
    """Every document is one letter, so a target of another letter crossed a border."""
    path = tmp_path / "letters.jsonl"
    path.write_text("".join(json.dumps({"text": letter * 45}) + "\n" for letter in "abcdefgh"))
    dataset = Dataset(JsonLines(str(path)), Tokenize("bytes", vocab_size=257), ConcatPack(32))
    stream = run(dataset, 5)
    ids, targets = stream["text_ids"], stream["text_targets"]
    counted = targets != -100
    assert ((targets == ids) | (targets == 256) | ~counted).all()
    assert (ids[counted] != 256).all()
    crossing = torch.roll(ids, -1, dims=1)  # planted fault: targets shifted across borders
    assert not ((crossing == ids) | (crossing == 256))[:, :-1].all()


def test_a_row_with_too_many_documents_is_padded(tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "ab"}\n' * 9)
    dataset = Dataset(JsonLines(str(path)), Tokenize("bytes", vocab_size=257), ConcatPack(16, max_documents=2))
    batch = next(iter(EvalLoader(dataset, batch=9)))[0]
    assert batch["text_ids"].shape == (5, 16)
    assert batch["text_document_ids"][0].tolist() == [0] * 3 + [1] * 3 + [-1] * 10
    assert batch["text_cu_seqlens"].tolist() == [0, 3, 6, 16, 19, 22, 32, 35, 38, 48, 51, 54, 64, 67] + [80] * 2
    check_rows(batch, 2)


# ---- finite data -------------------------------------------------------------------------------------------------------


def ended(dataset: Dataset, dp: int = 1, **settings: Any) -> tuple[int, list[str], list[dict[str, torch.Tensor]]]:
    """Steps, references and batches of all ranks to the end of finite data; every rank ends at the same step."""
    ends, refs, batches = set(), [], []
    for rank in range(dp):
        common = {"seed": 0, "global_batch": GLOBAL, "micro_batch": 2, "workers": 2} | settings
        loader = Loader(dataset, dp_rank=rank, dp_size=dp, **common)
        while (step := loader.next_step()) is not None:
            refs += step.refs
            batches += step.micro
        assert loader.next_step() is None and loader.number == (loader.total_steps or loader.number)
        ends.add(loader.number)
        loader.close()
    assert len(ends) == 1
    return ends.pop(), refs, batches


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("kind", ["numbers", "text", "best", "one"])
def test_every_remainder_policy(kind: str, dp: int, make: Any) -> None:
    dataset = make(kind) if kind != "numbers" else numbers(27)
    samples = {dataset.source.reference(i) for i in range(len(dataset))}
    names = lambda refs: [part.partition("[")[0] for row in refs for part in row.split(" + ") if part]  # noqa: E731
    steps, refs, _ = ended(dataset, dp, epochs=1, remainder="drop")
    assert set(names(refs)) <= samples
    if kind == "numbers":
        assert steps == 3 and len(names(refs)) == len(set(names(refs))) == 24
    wrapped, refs, _ = ended(dataset, dp, epochs=1, remainder="wrap")
    assert set(names(refs)) == samples and wrapped >= steps
    if kind == "numbers":
        assert wrapped == 4 and len(names(refs)) == 32
        with pytest.raises(UserError, match="Stack cannot make an empty row. Use drop or wrap"):
            ended(dataset, dp, epochs=1, remainder="pad")
        return
    padded, refs, batches = ended(dataset, dp, epochs=1, remainder="pad")
    assert padded == wrapped and set(names(refs)) == samples
    tokens = sum(dataset.units(batch) for batch in batches)
    assert tokens == sum(dataset.item(i).size for i in range(len(dataset)))  # every token once
    empty = [batch for batch in batches for row in batch["text_document_ids"] if (row < 0).all()]
    assert all((batch["text_cu_seqlens"].diff() >= 0).all() for batch in empty)


def test_a_mixture_of_finite_sources_ends() -> None:
    def made(ends: str) -> Dataset:
        mix = Mix({"a": 1, "b": 1}, by="samples", epochs={"a": 1, "b": 3}, ends=ends)
        return Dataset({"a": Numbers(16), "b": Numbers(16)}, Draw(), Stack(), mix)

    steps, refs, batches = ended(made("last"))
    assert steps == 8 and sum(int(batch["from_b"].sum()) for batch in batches) == 48
    steps, refs, _ = ended(made("first"))
    assert 3 <= steps <= 4
    with pytest.raises(UserError, match="data.remainder: pad belongs to `epochs`"):
        ended(made("last"), remainder="pad")
    with pytest.raises(UserError, match="16 samples x 1 passes, fewer than the 32 lanes.*Set data.lanes to 16"):
        Loader(made("last"), seed=0, global_batch=32, micro_batch=32)
    with pytest.raises(UserError, match="make no whole step of batch.global 64"):
        Loader(numbers(20), seed=0, global_batch=64, micro_batch=64, epochs=1, lanes=4)
    with pytest.raises(UserError, match="a mixture has no passes of its own"):
        ended(made("last"), epochs=1)
    with pytest.raises(UserError, match="shards is a stream, whose length is not known. Give `steps`"):
        ended(Dataset(Shards(), bytes_of(), ConcatPack(32)), epochs=1)


# ---- mixtures --------------------------------------------------------------------------------------------------------------


def test_shares_are_exact_after_every_sample(documents: str) -> None:
    mix = Mix({"a": 5, "b": 3, "c": 0.5}, by="samples")
    dataset = Dataset({name: Numbers(1000) for name in "abc"}, Draw(), Stack(), mix)
    refs = run(dataset, 200)
    total = {name: refs[f"from_{name}"].sum().item() for name in "abc"}
    for name, weight in mix.weights.items():
        assert abs(total[name] - 1600 * weight / 8.5) <= GLOBAL  # one sample a lane
    first = refs["from_c"][: 17 * GLOBAL].reshape(17, GLOBAL)
    assert first.sum() == GLOBAL and first.any(1).sum() > 3  # the rare source does not come to all lanes at once


def test_shares_of_tokens(make: Any) -> None:
    short = [{"text": "a" * 9}] * 50
    long = [{"text": "b" * 499}] * 50

    class Memory(Numbers):
        def __init__(self, records: list) -> None:
            super().__init__(len(records))
            self.records = records

        def read(self, index: int) -> dict[str, Any]:
            return self.records[index]

    sources = {"short": Memory(short), "long": Memory(long)}
    dataset = Dataset(sources, bytes_of(), ConcatPack(64, max_documents=64), Mix({"short": 1, "long": 3}))
    stream = run(dataset, 300)
    shares = {name: stream[f"text_from_{name}"].sum().item() for name in sources}
    assert shares["long"] / sum(shares.values()) == pytest.approx(0.75, abs=0.01)
    ids = stream["text_ids"]
    assert ((ids == 97) <= stream["text_from_short"]).all() and ((ids == 98) <= stream["text_from_long"]).all()
    tokens = stream["text_document_ids"] >= 0
    assert torch.equal(stream["text_from_short"] ^ stream["text_from_long"], tokens)


def test_wrong_mixtures() -> None:
    with pytest.raises(UserError, match="mix.weights: 'a' has the weight 0"):
        Mix({"a": 0})
    with pytest.raises(UserError, match="mix.by is 'token'. Did you mean 'tokens'"):
        Mix({"a": 1}, by="token")
    with pytest.raises(UserError, match="there is no source 'webb'. Did you mean 'web'"):
        Dataset({"web": Numbers(3)}, Draw(), Stack(), Mix({"web": 1, "webb": 1}))
    with pytest.raises(UserError, match="the source 'code' has no weight"):
        Dataset({"web": Numbers(3), "code": Numbers(3)}, Draw(), Stack(), Mix({"web": 1}))
    with pytest.raises(UserError, match="a dict of sources needs `mix"):
        Dataset({"web": Numbers(3)}, Draw(), Stack())
    with pytest.raises(UserError, match="one for each, or one for all"):
        Dataset({"a": Numbers(3), "b": Numbers(3)}, {"a": Draw()}, Stack(), Mix({"a": 1, "b": 1}))


# ---- what is left out --------------------------------------------------------------------------------------------------------


class Broken(Numbers):
    """Every seventh sample cannot be read."""

    def read(self, index: int) -> dict[str, Any]:
        if index % 7 == 3:
            raise OSError("bad block")
        return super().read(index)


@pytest.mark.parametrize(("dp", "workers"), [(1, 0), (2, 3)])
def test_bad_samples_are_left_out_and_told(dp: int, workers: int) -> None:
    dataset = Dataset(Broken(28), Draw(), Stack())
    with pytest.raises(UserError, match=r"numbers#\d+: OSError: bad block"):
        run(dataset, 4, dp=dp, workers=workers)
    told = []
    values = []
    for rank in range(dp):
        loader = Loader(
            dataset, seed=7, global_batch=8, micro_batch=4, dp_rank=rank, dp_size=dp, workers=workers, most_bad=4, epochs=1
        )
        while (step := loader.next_step()) is not None:
            told += step.left_out
            values += torch.cat([batch["value"] for batch in step.micro]).tolist()
        loader.close()
    assert all(int(entry["sample"].split("#")[1]) % 7 == 3 and entry["error"] == "OSError: bad block" for entry in told)
    assert len({entry["sample"] for entry in told}) == len(told) <= 4
    assert len(set(values)) == len(values) and not any(value % 7 == 3 for value in values)


def test_a_lane_that_finds_only_bad_samples_gives_up() -> None:
    class Dead(Numbers):
        def read(self, index: int) -> dict[str, Any]:
            raise OSError("no disk")

    with pytest.raises(UserError, match="OSError: no disk"):
        Loader(Dataset(Dead(50), Draw(), Stack()), seed=7, global_batch=8, micro_batch=8, most_bad=5, prefetch=0).next_step()


def test_a_broken_shard_counts_as_one_sample() -> None:
    class Cut(Shards):
        def open(self, shard: int, skip: int) -> Any:
            for n, sample in enumerate(super().open(shard, skip), start=skip):
                if shard == 1 and n == 4:
                    raise UserError("shard-1: the connection was lost after sample 3")
                yield sample

    dataset = Dataset(Cut((8, 8, 8)), bytes_of(), OnePerRow(64), block=2)
    loader = Loader(dataset, seed=0, global_batch=3, micro_batch=3, most_bad=2, prefetch=0)
    steps = [loader.next_step() for _ in range(10)]
    told = [entry for step in steps for entry in step.left_out]
    assert told and {entry["sample"] for entry in told} == {"shard-1"} and "connection was lost" in told[0]["error"]
    seen = [ref for step in steps for ref in step.refs]
    assert "shard-1#3" in seen and not any(f"shard-1#{n}" in seen for n in range(4, 8))


def test_a_bad_record_of_a_stream_is_one_sample(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"line {n}"}) for n in range(40)]
    lines[11] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    dataset = Dataset(JsonLinesStream(str(tmp_path / "a.jsonl")), bytes_of(), OnePerRow(64), block=4)
    loader = Loader(dataset, seed=0, global_batch=2, micro_batch=2, most_bad=5, prefetch=0)
    steps = [loader.next_step() for _ in range(20)]
    seen = {ref for step in steps for ref in step.refs}
    assert len(seen) >= 38 and {entry["sample"] for step in steps for entry in step.left_out} == {"a.jsonl#12"}


def test_what_is_met_after_the_last_step_is_told() -> None:
    class LateBad(Numbers):
        def read(self, index: int) -> dict[str, Any]:
            if index >= 8:
                raise OSError("bad block")
            return super().read(index)

    dataset = Dataset({"a": LateBad(12)}, Draw(), Stack(), Mix({"a": 1}, epochs={"a": 1}), shuffle=False)
    loader = Loader(dataset, seed=0, global_batch=2, micro_batch=2, most_bad=9, prefetch=0)
    told = []
    while (step := loader.next_step()) is not None:
        told += step.left_out
    assert {entry["sample"] for entry in told + loader.left_out()} == {f"numbers#{n}" for n in range(8, 12)}


def test_sizes_that_change_with_the_epoch_are_counted() -> None:
    class Grows(AsIds):
        sizes_vary = True

        def __call__(self, sample: dict[str, Any], visit: Any) -> dict[str, np.ndarray]:
            return {"ids": np.zeros(4 + 4 * visit.epoch, dtype=np.int64)}

    dataset = Dataset(Numbers(64), Grows(), ConcatPack(16))
    for remainder, samples in (("drop", 128), ("pad", 128)):
        steps, refs, _ = ended(dataset, epochs=2, remainder=remainder, micro_batch=8)
        assert steps == (64 * 4 + 64 * 8) // 16 // 8 == 6 and sum(len(row.split(" + ")) for row in refs) >= samples


def test_too_long_by_policy(documents: str) -> None:
    lines, tokens = JsonLines(documents), bytes_of()
    sizes = {lines.reference(i): Dataset(lines, tokens, OnePerRow(99)).item(i).size for i in range(len(lines))}
    long = {name for name, size in sizes.items() if size > 32}
    for pack in (FitPack, OnePerRow):
        with pytest.raises(UserError, match=r"documents.jsonl#\d+: it has \d+ tokens, more than a row's 32. Set pack.too_long"):
            run(Dataset(lines, tokens, pack(32)), 5)
        dataset = Dataset(lines, tokens, pack(32, too_long="drop"))
        loader = Loader(dataset, seed=0, global_batch=4, micro_batch=4, epochs=1, remainder="pad")
        steps = []
        while (step := loader.next_step()) is not None:
            steps.append(step)
        loader.close()
        assert {entry["sample"] for step in steps for entry in step.left_out} == long
        assert all(entry["dropped"] for step in steps for entry in step.left_out)
        kept = {part for step in steps for row in step.refs for part in row.split(" + ") if part}
        assert kept == set(sizes) - long
    longest = max((lines.read(i)["text"] for i in range(len(lines))), key=len)
    long_ones = JsonLines(documents, where={"text": longest})
    dataset = Dataset(long_ones, tokens, FitPack(8, too_long="drop"))
    with pytest.raises(UserError, match="more than a row's 8. None of the"):
        Loader(dataset, seed=0, global_batch=1, micro_batch=1, prefetch=0).next_step()
    refs = " + ".join(run(Dataset(lines, tokens, OnePerRow(32, too_long="split")), 10)["refs"])
    assert "[0:32]" in refs and "[32:" in refs


# ---- fitted packs --------------------------------------------------------------------------------------------------------


def rows_of(dataset: Dataset, count: int) -> list:
    rows = dataset.rows(dataset.items())
    return [next(rows) for _ in range(count)]


class LogNormal:
    """Documents whose lengths are log-normal with the mean 700, cut at 8192."""

    path = "log-normal"

    def __init__(self, samples: int = 20_000) -> None:
        sizes = np.random.default_rng(1).lognormal(np.log(700) - 0.5, 1.0, samples)
        self.sizes = np.clip(sizes, 1, 8192).astype(int)

    def __len__(self) -> int:
        return len(self.sizes)

    def reference(self, index: int) -> str:
        return f"log-normal#{index}"

    def read(self, index: int) -> dict[str, Any]:
        return {"ids": np.broadcast_to(np.int64(1), self.sizes[index])}


class AsIds:
    def keys(self) -> dict[str, KeySpec]:
        return {"ids": KeySpec(torch.int64, ("T",), 0)}

    def check(self) -> None: ...

    def __call__(self, sample: dict[str, Any], visit: Any) -> dict[str, np.ndarray]:
        return sample


def test_best_fit_fills_rows_and_none_waits_long() -> None:
    dataset = Dataset(LogNormal(), AsIds(), FitPack(8192))
    rows = rows_of(dataset, 1500)
    filled = np.mean([sum(piece.stop - piece.start for piece in row) for row in rows]) / 8192
    assert filled >= 0.995, filled
    # by the time a document is in a row, fewer than 32 rows have begun with one that came after it
    came = [max(int(piece.item.reference.split("#")[1]) for piece in row) for row in rows]
    waited = []
    for number, row in enumerate(rows):
        for piece in row:
            index = int(piece.item.reference.split("#")[1])
            drawn = next(i for i, newest in enumerate(np.maximum.accumulate(came)) if newest + 32 >= index)
            waited.append(number - drawn)
    assert max(waited) <= 32
    for settings, least in (({"buffer": 8}, 0.99), ({"fit": "first"}, 0.9)):
        other = rows_of(Dataset(LogNormal(), AsIds(), FitPack(8192, **settings)), 500)
        assert np.mean([sum(piece.stop - piece.start for piece in row) for row in other]) / 8192 > least


def test_costs_are_balanced() -> None:
    cost = Cost(tokens=1.0, squared=1e-3)
    plain = rows_of(Dataset(LogNormal(), AsIds(), FitPack(8192)), 300)
    limit = cost.of(plain[0][0].item, 8192)  # the dearest document: one that fills a row
    fitted = rows_of(Dataset(LogNormal(), AsIds(), FitPack(65536, cost=cost, max_cost=limit)), 200)
    costs = [[sum(cost.of(p.item, p.stop - p.start) for p in row) for row in rows] for rows in (plain, fitted)]
    assert max(costs[1]) <= limit
    assert np.std(costs[1]) / np.mean(costs[1]) < 0.5 * np.std(costs[0]) / np.mean(costs[0])


def test_masked_tokens_are_no_targets() -> None:
    class Masked(AsIds):
        def keys(self) -> dict[str, KeySpec]:
            return super().keys() | {"trained": KeySpec(torch.bool, ("T",), 0)}

        def __call__(self, sample: dict[str, Any], visit: Any) -> dict[str, np.ndarray]:
            ids = np.arange(int(visit.reference.split("#")[1]), dtype=np.int64) + 10
            return {"ids": ids, "trained": ids % 3 == 0}

    class Counted(LogNormal):
        def __init__(self) -> None:
            self.sizes = np.arange(1, 9)

        def reference(self, index: int) -> str:
            return f"n#{self.sizes[index]}"

    for pack in (ConcatPack(8), FitPack(8), OnePerRow(8)):
        dataset = Dataset(Counted(), Masked(), pack)
        batch = next(iter(EvalLoader(dataset, batch=4)))[0]
        targets, ids = batch["text_targets"], batch["text_ids"]
        counted = targets != -100
        assert counted.any() and (targets[counted] % 3 == 0).all() and (targets[counted] == ids[counted] + 1).all()
        with pytest.raises(UserError, match="also makes \\['other'\\]"):
            pack.keys({"ids": KeySpec(torch.int64, ("T",)), "other": KeySpec(torch.int64, ())})


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_finite_data_ends_at_the_same_step_on_all_ranks(dp: int, text: Dataset) -> None:
    for dataset in (numbers(27), text):
        ends = []
        for rank in range(dp):
            loader = Loader(dataset, seed=0, global_batch=GLOBAL, micro_batch=2, dp_rank=rank, dp_size=dp, epochs=3, workers=2)
            refs = []
            while (step := loader.next_step()) is not None:
                refs += step.refs
            ends.append((loader.number, loader.total_steps))
            assert loader.next_step() is None
            loader.close()
        assert len(set(ends)) == 1 and ends[0][0] == ends[0][1] > 0
        if dataset is not text:
            assert ends[0][0] == 27 * 3 // GLOBAL


def test_finite_packs_use_no_sample_more_often_than_epochs(text: Dataset) -> None:
    loader = Loader(text, seed=0, global_batch=GLOBAL, micro_batch=GLOBAL, epochs=1)
    tokens = 0
    for _ in range(loader.total_steps):
        step = loader.next_step()
        tokens += int((step.micro[0]["text_document_ids"] >= 0).sum())
        assert all(lane["taken"][""] * GLOBAL + int(number) <= len(text) + GLOBAL for number, lane in step.state.items())
    total = sum(len(document) for document in documents_of(text))
    assert 0 < tokens <= total
    loader.close()


@pytest.mark.parametrize("kind", ["numbers", "text"])
@pytest.mark.parametrize("dp", [1, 2, 3, 8])
def test_eval_covers_every_row_once_and_ranks_stay_together(kind: str, dp: int, text: Dataset) -> None:
    dataset = numbers(23) if kind == "numbers" else text
    whole = [batch for batch, valid in EvalLoader(dataset, batch=4) if valid]
    ranks = [list(EvalLoader(dataset, batch=4, dp_rank=rank, dp_size=dp)) for rank in range(dp)]
    assert len({len(batches) for batches in ranks}) == 1
    dealt = [batches[turn] for turn in range(len(ranks[0])) for batches in ranks]
    valid = [batch for batch, is_valid in dealt if is_valid]
    assert len(valid) == len(whole)
    for one, other in zip(whole, valid, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.cat([batch["row"] for batch in valid]).tolist() == list(range(sum(len(batch["row"]) for batch in whole)))


# ---- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 0), (0, 2), (3, 2)])
def test_a_bad_sample_surfaces_with_its_reference(workers: int, prefetch: int) -> None:
    loader = Loader(numbers(1001), seed=0, global_batch=100, micro_batch=100, workers=workers, prefetch=prefetch)
    with pytest.raises(UserError, match=r"^numbers#1000: ValueError: broken"):
        for _ in range(11):
            loader.next_step()
    with pytest.raises(UserError, match="numbers#1000"):  # and again: the stream has ended there
        loader.next_step()
    loader.close()


def test_close_ends_all_threads() -> None:
    before = set(threading.enumerate())
    loader = Loader(numbers(), seed=0, global_batch=8, micro_batch=8, workers=3)
    loader.next_step()
    assert set(threading.enumerate()) > before
    loader.close()
    loader.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(UserError, match="closed"):
        loader.next_step()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"global_batch": 30, "micro_batch": 4, "dp_size": 4}, ["batch.global is 30", "batch.micro 4 x 4", "16 or 32"]),
        ({"global_batch": 32, "micro_batch": 3, "dp_size": 4}, ["batch.global is 32", "24 or 36", "batch.micro 2 or 4"]),
        ({"global_batch": 4, "micro_batch": 4, "dp_size": 2}, ["batch.global is 4", "global 8", "batch.micro 1 or 2"]),
        ({"global_batch": 16, "micro_batch": 4, "lanes": 3}, ["data.lanes is 3;", "2, 4"]),
        ({"global_batch": 1024, "micro_batch": 1, "dp_size": 512}, ["256, its default", "what fits: 512, 1024"]),
        ({"global_batch": 16, "micro_batch": 4, "dp_size": 4, "lanes": 2}, ["data.lanes is 2", "4, 8, 16"]),
        ({"global_batch": 16, "micro_batch": 4, "epochs": 0}, ["epochs is 0"]),
    ],
)
def test_bad_numbers(arguments: dict[str, int], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        Loader(numbers(), seed=0, **arguments)
    for word in words:
        assert word in str(error.value)


def test_bad_states() -> None:
    state = run(numbers(), 2)["state"][-1]
    make = {"seed": 7, "global_batch": 8, "micro_batch": 8}
    with pytest.raises(UserError, match="8 lanes, but data.lanes is 4.*Set data.lanes: 8"):
        Loader(numbers(), **make, lanes=4, state=state)
    with pytest.raises(UserError, match="another stream"):
        Loader(numbers(22), **make, state=state)
    with pytest.raises(UserError, match="another stream"):
        Loader(numbers(), **(make | {"seed": 8}), state=state)
    with pytest.raises(UserError, match="different steps"):
        Loader(numbers(), **make, state=state | {"0": state["0"] | {"rows": 3}})


def test_default_lanes() -> None:
    assert [default_lanes(n) for n in (1, 16, 64, 256, 1000, 1024, 257)] == [1, 16, 64, 256, 250, 256, 1]


def test_few_shards_are_said(caplog: pytest.LogCaptureFixture) -> None:
    stream = Dataset(Shards(), bytes_of(), FitPack(64), block=3)
    for lanes in (5, 10):
        Loader(stream, seed=0, global_batch=10, micro_batch=10, lanes=lanes, prefetch=0).close()
    assert [record.getMessage() for record in caplog.records] == [
        "shards has 5 shards for 10 lanes, so each is read 2 times over. Set data.lanes: 5 or less, or write more shards."
    ]


def test_a_huge_document_waits_as_one(tmp_path: Path) -> None:
    """Of 94 parts a state says where the next begins, and no more; others come in between, and no byte is lost."""
    path = tmp_path / "huge.jsonl"
    texts = ["z" * 3000, *(letter * 20 for letter in "abcdefgh")]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pack = FitPack(32, buffer=4, too_long="split")
    dataset = Dataset(JsonLines(str(path)), Tokenize("bytes", vocab_size=257), pack, shuffle=False)
    loader = Loader(dataset, seed=7, global_batch=1, micro_batch=1, prefetch=0, epochs=1)
    steps = [loader.next_step() for _ in range(loader.total_steps)]
    assert max(len(step.state["0"]["pack"]["waiting"]) for step in steps) <= 4
    rows = torch.cat([step.micro[0]["text_ids"][step.micro[0]["text_document_ids"] >= 0] for step in steps])
    found = bytes(token for token in rows.tolist() if token != 256).decode()
    assert sorted(found) == sorted("".join(texts))
    assert all(letter in found[:1000] for letter in "abcdefgh")
