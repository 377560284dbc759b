"""MetaModel: noise, preprocessor, trunk, postprocessor and head blocks that share one data_dict.

Each part is a block, another MetaModel, or a named dict of them (named, so that a config can override one and a parameter
keeps its name when another is inserted). A MetaModel is entered only by its ``forward``; the order of its blocks is fixed
when it is built, and a ``Graph`` says which of them run and which keys are dropped after which block.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.core.block import Data, ReadWriteBlock
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.init import Init

PARTS = ("noise", "preprocessor", "trunk", "postprocessor", "head")


@dataclass(frozen=True)
class Step:
    """One block of a graph, and the keys that nobody reads after it."""

    path: str
    block: ReadWriteBlock
    drop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """The blocks that run, in order. The training graph and the inference graph of a model share the modules."""

    steps: tuple[Step, ...]
    inference: bool = False

    def run(self, data: Data) -> Data:
        for step in self.steps:
            data = step.block(data, self.inference)
            for key in step.drop:
                data.pop(key, None)  # the block returned a new dict, so this one is ours
        return data


class MetaModel(nn.Module):
    """Blocks in series that share a data_dict.

    Args:
        preprocessor, trunk, postprocessor, head: each a block, a MetaModel, or a named dict of them, run in this order.
        noise: likewise, run before them: so the same model can be trained with noise without a parameter changing its name.
        stream: the default stream of every block inside (see ``ReadWriteBlock``).
        tie: ``{parameter: parameter it shares}``, e.g. ``{head.proj.weight: preprocessor.embed.weight}``.
        draw: ``{pattern: Init}``: how parameters (of matching names, a later pattern before an earlier one) start, instead of
            as their layers say.

    Raises:
        UserError: a part is not a block, a tied name is not a parameter, or a pattern of ``draw`` matches none.
    """

    def __init__(
        self,
        preprocessor: Any = None,
        trunk: Any = None,
        postprocessor: Any = None,
        head: Any = None,
        *,
        noise: Any = None,
        stream: str | None = None,
        tie: Mapping[str, str] | None = None,
        draw: Mapping[str, Init] | None = None,
    ) -> None:
        super().__init__()
        for name, part in zip(PARTS, (noise, preprocessor, trunk, postprocessor, head), strict=True):
            if part is not None:
                self.add_module(name, as_part(part, name))
        if not any(True for _ in self.children()):
            raise UserError(f"MetaModel is empty: give it at least one of {', '.join(PARTS)}.")
        self.set_stream(stream)
        self.tie = dict(tie or {})
        self.retie()
        self.drawn: dict[str, Init] = {}
        names = [name for name, _ in self.named_parameters()]
        for pattern, init in (draw or {}).items():
            hits = fnmatch.filter(names, pattern)
            if not hits:
                raise UserError(f"draw: the pattern '{pattern}' matches no parameter. {did_you_mean(pattern, names)}")
            self.drawn |= dict.fromkeys(hits, init)
        self.graph = Graph(tuple(Step(path, block) for path, block in self.blocks()))

    def set_stream(self, stream: str | None) -> None:
        for _, block in walk(self):
            block.set_stream(stream)

    def blocks(self) -> Iterator[tuple[str, ReadWriteBlock]]:
        """``(path, block)`` of every block in execution order."""
        return walk(self)

    def retie(self) -> None:
        """Make the tied parameters one tensor again (``to_empty`` and sharding part them), those of models inside too."""
        for module in self.modules():
            if isinstance(module, MetaModel) and module is not self:
                module.retie()
        for target, source in self.tie.items():
            parameter = self._parameter(source)
            owner, _, leaf = target.rpartition(".")
            self._parameter(target)
            setattr(self.get_submodule(owner), leaf, parameter)

    def _parameter(self, name: str) -> nn.Parameter:
        owner, _, leaf = name.rpartition(".")
        try:
            parameter = getattr(self.get_submodule(owner), leaf)
        except AttributeError:
            names = [n for n, _ in self.named_parameters(remove_duplicate=False)]
            raise UserError(f"tie: '{name}' is not a parameter of this model. {did_you_mean(name, names)}") from None
        return parameter

    def forward(self, data: Data, graph: Graph | None = None) -> Data:
        """Run ``graph`` (default: the training graph) on ``data``; the given dict is not changed."""
        return (graph or self.graph).run(dict(data))

    def inference(self) -> Graph:
        """The smaller graph: without ``training_only`` blocks, and with what blocks write at inference."""
        return Graph(tuple(Step(p, b) for p, b in self.blocks() if not b.training_only), inference=True)


class Series(nn.ModuleDict):
    """Named MetaModels that run one after the other: ``model:`` as a named dict."""


def as_model(model: Any) -> Any:
    """What a ``model`` section builds: a named dict becomes a Series, anything else stays (``parts_of`` judges it)."""
    return Series(model) if isinstance(model, Mapping) and not isinstance(model, nn.Module) else model


def as_part(part: Any, path: str) -> nn.Module:
    """A block or a MetaModel as it is; a named dict of them as a ModuleDict; anything else is an error."""
    if isinstance(part, (ReadWriteBlock, MetaModel)):
        return part
    if isinstance(part, Mapping):
        return nn.ModuleDict({name: as_part(value, f"{path}.{name}") for name, value in part.items() if value is not None})
    raise UserError(
        f"{path} is a {type(part).__name__}; a part is a block (ReadWriteBlock), a MetaModel or a named dict of them. "
        "Lift any other nn.Module with l3m_like.core.Wrap(module, reads, writes)."
    )


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, ReadWriteBlock]]:
    """Every block below ``module`` in execution order. Frozen parts and towers are one block each."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if isinstance(child, ReadWriteBlock):
            yield child_path, child
        else:
            yield from walk(child, child_path)


class _Nested(ReadWriteBlock):
    """A MetaModel (or block) seen from outside as one block: its ports are the keys that cross its border."""

    def __init__(self, model: Any, *, training_only: bool = False) -> None:
        self._inputs: dict[str, bool] = {}
        self._outputs: tuple[str, ...] = ()
        super().__init__(training_only=training_only)
        self.model = model if isinstance(model, MetaModel) else MetaModel(model)
        self._refresh()

    def _refresh(self) -> None:
        written: dict[str, None] = {}
        inputs: dict[str, bool] = {}
        for _, block in self.model.blocks():
            for port, key in block.reads.items():
                if key not in written:
                    inputs[key] = inputs.get(key, True) and port not in block.required
            written |= dict.fromkeys(block.writes.values())
        self._inputs, self._outputs = inputs, tuple(written)
        self.ports = dict(inputs)

    def set_stream(self, stream: str | None) -> None:
        self.model.set_stream(stream)
        self._refresh()

    def read_ports(self) -> dict[str, bool]:
        return {}

    @property
    def reads(self) -> dict[str, str]:
        return {key: key for key in self._inputs}

    @property
    def required(self) -> set[str]:
        return {key for key, optional in self._inputs.items() if not optional}

    @property
    def writes(self) -> dict[str, str]:
        return {key: key for key in self._outputs}

    def writes_in(self, inference: bool) -> dict[str, str]:
        if not inference:
            return self.writes
        return {key: key for step in self.model.inference().steps for key in step.block.writes_in(True).values()}

    def bind(self, mesh: Any) -> None:
        for _, block in self.model.blocks():
            block.bind(mesh)

    def shard_units(self) -> Iterable[nn.Module]:
        for _, block in self.model.blocks():
            yield from block.shard_units()

    def _run(self, data: Data, inference: bool) -> Data:
        graph = self.model.inference() if inference else None
        inside = self.model({key: data[key] for key in self._inputs if key in data}, graph)
        return {key: inside[key] for key in self.writes_in(inference)}


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Give ``module`` the floating-point dtype ``dtype``; modules with ``full_precision`` keep at least float32."""
    module.to(dtype)
    for inner in module.modules():
        if getattr(inner, "full_precision", False):
            inner.to(torch.promote_types(dtype, torch.float32))


class Frozen(_Nested):
    """A MetaModel or block that is not trained: no gradients, evaluation mode, its own dtype, no optimizer state.

    Args:
        model: what is frozen.
        dtype: of its parameters, in which it computes whatever the run's precision is (None: that of the run).
        random_weights: accept that no weights were loaded; it is printed and stamped into every report.
        passes_gradients: gradients go through it to what its inputs were computed from (a perceptual distance, the features
            that a discriminator looks at).
    """

    def __init__(
        self,
        model: Any,
        *,
        dtype: str | None = None,
        random_weights: bool = False,
        passes_gradients: bool = False,
        training_only: bool = False,
    ) -> None:
        super().__init__(model, training_only=training_only)
        self.random_weights = random_weights
        self.passes_gradients = passes_gradients
        self.loaded_from: str | None = None  # set by whoever loads the weights
        self.model.requires_grad_(False)
        self.dtype: torch.dtype | None = None
        if dtype is not None:
            self.dtype = getattr(torch, dtype, None)
            if not isinstance(self.dtype, torch.dtype):
                near = did_you_mean(dtype, ("float32", "bfloat16", "float16"))
                raise UserError(f"Frozen.dtype: there is no dtype '{dtype}'. {near}")
            cast(self.model, self.dtype)
        self.train(False)

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)

    def forward(self, data: Data, inference: bool = False) -> Data:
        if self.passes_gradients:
            return data | self._run(data, inference)
        with torch.no_grad():
            return data | self._run(data, inference)


class Tower(_Nested):
    """A MetaModel whose input may be absent on this rank (a batch without images).

    Under FSDP every rank must run every sharded module, or the others wait for ever. A tower without input therefore runs
    its declared dummy row, and what it writes is cut to length zero: the shapes are those of "no image", every parameter
    takes part in the graph, and its gradient is an exact zero (not ``0 * NaN``).

    Args:
        model: what runs.
        dummy: ``{key: shape of one row}`` of its inputs (without the batch dimension), filled with zeros.
        dtypes: ``{key: dtype name}`` of those that are not float32.
    """

    def __init__(
        self,
        model: Any,
        *,
        dummy: Mapping[str, Iterable[int]],
        dtypes: Mapping[str, str] | None = None,
        training_only: bool = False,
    ) -> None:
        super().__init__(model, training_only=training_only)
        self._dummy = {key: tuple(shape) for key, shape in dummy.items()}
        self._dtypes = dict(dtypes or {})
        for key in self._dummy:
            if key not in self._inputs:
                raise UserError(f"Tower.dummy names '{key}', which its model does not read. {did_you_mean(key, self._inputs)}")

    @property
    def required(self) -> set[str]:
        return super().required - set(self._dummy)

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        """The keys that may be absent, or empty, on a rank."""
        return tuple(self._dummy)

    def after_step(self, mesh: Any, skipped: Tensor | None = None) -> None:
        for _, block in self.model.blocks():
            block.after_step(mesh, skipped)

    def dummy(self, device: torch.device) -> dict[str, Tensor]:
        """One row of zeros per declared input."""
        return {
            key: torch.zeros(1, *shape, dtype=getattr(torch, self._dtypes.get(key, "float32")), device=device)
            for key, shape in self._dummy.items()
        }

    def forward(self, data: Data, inference: bool = False) -> Data:
        if all(key in data and data[key].shape[0] > 0 for key in self._dummy):
            return data | self._run(data, inference)
        device = next(self.model.parameters()).device
        out = self._run({k: v for k, v in data.items() if k not in self._dummy} | self.dummy(device), inference)
        return data | {key: value[:0] for key, value in out.items()}
