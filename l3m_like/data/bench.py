"""The loader beside others, on the same files: documents of text in tar shards, read once and tokenized."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l3m_like.data.dataset import Dataset
from l3m_like.data.loader import Loader
from l3m_like.data.packing import ConcatPack
from l3m_like.data.paths import SHIPPED
from l3m_like.data.processors.token_ids import TokenIds
from l3m_like.data.processors.tokenize import Tokenize
from l3m_like.data.sources.megatron import Megatron, MegatronWriter
from l3m_like.data.sources.web_dataset import WebDataset

VOCABULARY = 8192
SHARDS = 8


@dataclass(frozen=True)
class Files:
    """What all sides read."""

    tars: list[str]
    streaming: str  # the same documents in the format of MosaicML Streaming, written when that side first runs
    tokenizer: str
    megatron: str
    documents: int
    tokens: int


def make_files(folder: Path, megabytes: int) -> Files:
    """Documents of about 3 kB cut from the shipped Shakespeare, shuffled over tars, and a byte-level BPE trained on it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    lines = (SHIPPED / "shakespeare.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n".join(json.loads(line)["text"] for line in lines)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    draw = np.random.Generator(np.random.Philox(key=0))
    count = megabytes * 1_000_000 // 3000
    starts, sizes = draw.integers(0, len(text) - 6000, count), draw.integers(500, 5500, count)
    tars = []
    total = 0
    with MegatronWriter(str(folder / "tokens"), VOCABULARY) as writer:
        for shard in range(SHARDS):
            path = folder / f"text-{shard}.tar"
            with tarfile.open(path, "w") as tar:
                for number in range(shard, count, SHARDS):
                    document = text[starts[number] : starts[number] + sizes[number]]
                    content = document.encode()
                    member = tarfile.TarInfo(f"{number:08d}.txt")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                    ids = tokenizer.encode(document).ids
                    total += len(ids)
                    writer.add(np.array(ids))
            tars.append(str(path))
    return Files(tars, str(folder / "mds"), str(folder / "tokenizer.json"), str(folder / "tokens"), count, total)


def _tokenize(files: Files) -> Callable[[bytes], np.ndarray]:
    """The work that every side does on one document."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(files.tokenizer)
    return lambda content: np.array(tokenizer.encode(content.decode()).ids, dtype=np.int64)


class _Work:
    """``_tokenize`` for worker processes, which get it pickled."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.tokenize: Callable[[bytes], np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "tokenize": None}

    def __call__(self, sample: Any) -> np.ndarray:
        self.tokenize = self.tokenize or _tokenize(self.files)
        return self.tokenize(sample["txt"])


def _rate(tokens_of: Iterator[int], total: int | None = None) -> float:
    """Tokens per second from the first batch on (starting workers is not what is compared); with ``total``, all must come."""
    first = next(tokens_of)
    began = time.perf_counter()
    later = sum(tokens_of)
    seconds = time.perf_counter() - began
    if total is not None and first + later != total:
        raise RuntimeError(f"{first + later} tokens came, instead of {total}")
    return later / seconds


def _ours(dataset: Dataset, tokens: int, workers: int) -> float:
    """Of our Loader: shuffled, packed into rows of 2048, ``tokens`` of them."""
    loader = Loader(dataset, seed=0, global_batch=8, micro_batch=8, workers=workers)

    def steps() -> Iterator[int]:
        seen = 0
        while seen < tokens:
            step = loader.next_step()
            assert step is not None
            seen += (units := sum(dataset.units(batch) for batch in step.micro))
            yield units

    rate = _rate(steps())
    loader.close()
    return rate


def ours(files: Files, workers: int) -> float:
    """Tokens per second of our Loader over the tars."""
    process = Tokenize(files.tokenizer, vocab_size=VOCABULARY, field="txt")
    process.check()
    source = WebDataset(str(Path(files.tars[0]).parent / "text-*.tar"))
    return _ours(Dataset(source, process, ConcatPack(2048)), files.tokens, workers)


def webdataset(files: Files, workers: int) -> float:
    """Of webdataset: shards split over worker processes, a shuffle buffer, nothing packed."""
    import webdataset as wds

    loader = wds.WebLoader(
        _tars(files), batch_size=None, collate_fn=_listed, num_workers=workers, prefetch_factor=4 if workers else None
    )
    return _rate((sum(map(len, batch)) for batch in loader), files.tokens)


def _tars(files: Files) -> Any:
    """webdataset's pipeline over the tars, in batches of 8 documents."""
    import webdataset as wds

    dataset = wds.WebDataset(files.tars, shardshuffle=False, nodesplitter=None).shuffle(1000).map(_Work(files))
    return dataset.batched(8, collation_fn=_listed)


def _listed(batch: Any) -> list[Any]:
    return list(batch)


def torchdata(files: Files, workers: int) -> float:
    """Of torchdata's StatefulDataLoader over webdataset's tars."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader: Any = StatefulDataLoader(
        _tars(files), batch_size=None, collate_fn=_listed, num_workers=workers, prefetch_factor=4 if workers else None
    )
    return _rate((sum(map(len, batch)) for batch in loader), files.tokens)


def streaming(files: Files, workers: int) -> float:
    """Of MosaicML Streaming, its files written before the clock starts."""
    import torch

    from l3m_like.core.torchvision_ops import allow_torchvision

    allow_torchvision()
    import streaming as mosaic

    if not Path(files.streaming).exists():
        with mosaic.MDSWriter(out=files.streaming, columns={"txt": "bytes"}) as out:
            for tar in files.tars:
                with tarfile.open(tar) as members:
                    for member in members:
                        content = members.extractfile(member)
                        assert content is not None
                        out.write({"txt": content.read()})
    mosaic.base.util.clean_stale_shared_memory()
    work = _Work(files)

    class Tokens(mosaic.StreamingDataset):
        def __getitem__(self, index: int) -> np.ndarray:
            return work(super().__getitem__(index))

    dataset = Tokens(local=files.streaming, shuffle=True, batch_size=8)
    loader: Any = torch.utils.data.DataLoader(
        dataset, batch_size=8, num_workers=workers, collate_fn=list, prefetch_factor=4 if workers else None
    )
    return _rate((sum(map(len, batch)) for batch in loader), files.tokens)


def megatron_rate(files: Files) -> float:
    """Tokens per second of our Loader over Megatron's files."""
    return _ours(Dataset(Megatron(files.megatron), TokenIds(VOCABULARY), ConcatPack(2048)), files.tokens, 0)


#: ``{name: rate(files, workers)}``
SIDES: dict[str, Callable[[Files, int], float]] = {
    "l3m_like": ours,
    "webdataset": webdataset,
    "torchdata": torchdata,
    "MosaicML Streaming": streaming,
}
