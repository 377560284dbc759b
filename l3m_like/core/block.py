"""ReadWriteBlock: tensors in, tensors out; the base class does the dictionary work.

A block's author writes ``compute`` on tensors. Its parameters are the *read ports*: one without a default is required, one
with the default ``None`` is optional. The class attribute ``outputs`` names the *write ports*. A port becomes a key of the
shared ``data_dict`` by ``reads``/``writes``, or, when it is not mapped, by its stream: port ``tokens`` of a block in the
stream ``text`` is the key ``text_tokens``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from l3m_like.core.errors import UserError, did_you_mean

#: Ports that mean the same in every stream; their key is the port itself. ``row`` [B] int64 is the running number of a row
#: in the run, the key of every random draw (see ``core/random.py``).
GLOBAL_PORTS = frozenset({"row"})

Data = dict[str, Any]


class ReadWriteBlock(nn.Module):
    """A module that reads named keys of the data_dict and returns it with named keys added.

    Args:
        reads: ``{port: key}`` for read ports whose key is not ``<stream>_<port>``.
        writes: ``{port: key}`` likewise, or a list of port names: which of the optional outputs to write.
        stream: prefix of unmapped keys; a block inside a MetaModel takes that of its parent.
        training_only: leave this block out of the inference graph (noise, condition dropout); see ``MetaModel.inference``.

    Raises:
        UserError: a name in ``reads`` or ``writes`` is not a port of this block.
    """

    #: names of what ``compute`` returns, in order (one name: a single value; several: a tuple).
    outputs: tuple[str, ...] = ()
    #: of ``outputs``, those written only if ``writes`` names them.
    optional_outputs: tuple[str, ...] = ()
    #: what the inference graph writes instead (None: the same).
    inference_outputs: tuple[str, ...] | None = None
    #: ``{parameter: whose}`` of those that another block has as well; `tie` joins them.
    shared: Mapping[str, str] = {}

    def __init__(
        self,
        *,
        reads: Mapping[str, str] | None = None,
        writes: Mapping[str, str] | Sequence[str] | None = None,
        stream: str | None = None,
        training_only: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        #: ``{read port: is optional}``
        self.ports = self.read_ports()
        reads = dict(reads or {})
        for port in reads:
            if port not in self.ports:
                raise UserError(f"{name} has no read port '{port}'. {did_you_mean(port, self.ports)}")
        named = dict.fromkeys(writes) if isinstance(writes, Sequence) else dict(writes or {})
        for port in named:
            if port not in self.outputs:
                raise UserError(f"{name} has no write port '{port}'. {did_you_mean(port, self.outputs)}")
        self.stream = stream
        self.training_only = training_only
        self._reads = reads
        self._writes: dict[str, str | None] = {
            port: named.get(port) for port in self.outputs if port not in self.optional_outputs or port in named
        }
        if not self._writes and self.outputs:
            raise UserError(f"{name} writes nothing: name one of {list(self.outputs)} in `writes`.")

    # ---- what an author writes -------------------------------------------------------------------------------------

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """Tensors in, tensors out. The signature declares the read ports."""
        raise UserError(f"{type(self).__name__} does not define compute(...).")

    def shard_units(self) -> Iterable[nn.Module]:
        """The repeating units: what FSDP, activation checkpointing and compile treat as one each."""
        return ()

    def flops(self, *args: Any, **ports: Any) -> int | None:
        """Forward FLOPs for these ports (the same as compute's; intermediate ones may be on meta). None: not declared."""
        return None if any(True for _ in self.parameters()) else 0

    def limits(self, *args: Any, **ports: Any) -> dict[str, int]:
        """``{port: n}`` of ports whose numbers must lie in 0 .. n - 1 (classes, tokens): where data gives them, they are compared
        before they reach the accelerator. The arguments are those of ``flops``."""
        return {}

    def bind(self, mesh: Any) -> None:
        """The one hook for a block that must communicate; called once, after the mesh is built."""

    def after_step(self, mesh: Any, skipped: Tensor | None = None) -> None:
        """Called once per optimizer step, after it (router biases, codebooks, statistics).

        ``skipped``: a device scalar, 1 where the step was skipped and nothing may change; None: it was not.
        """

    def read_ports(self) -> dict[str, bool]:
        """``{port: is optional}`` from the signature of ``compute``."""
        if type(self).compute is ReadWriteBlock.compute:
            raise UserError(f"{type(self).__name__} does not define compute(...).")
        ports = {}
        for name, parameter in inspect.signature(self.compute).parameters.items():
            if name == "outputs" and self.optional_outputs:
                continue  # which optional outputs to compute; not a port
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise UserError(f"{type(self).__name__}.compute takes *args or **kwargs; its parameters must be named ports.")
            if parameter.default is not parameter.empty and parameter.default is not None:
                raise UserError(f"{type(self).__name__}.compute: the default of port '{name}' must be None.")
            ports[name] = parameter.default is None
        return ports

    def read_if(self, port: str, used: bool) -> None:
        """The optional read port ``port`` is one only where a setting makes use of it; called when the block is built.

        Raises:
            UserError: `reads` names it, and nothing would read it.
        """
        if used:
            return
        if port in self._reads:
            raise UserError(f"{type(self).__name__}: `reads` names '{port}', which is not read with these settings; delete it.")
        self.ports.pop(port, None)  # a subclass may be without it

    # ---- the dictionary work ---------------------------------------------------------------------------------------

    def key(self, port: str) -> str:
        """The key of an unmapped ``port`` in this block's stream; the port ``image`` of the stream ``image`` is ``image``."""
        if port in GLOBAL_PORTS or not self.stream or port == self.stream:
            return port
        return f"{self.stream}_{port}"

    @property
    def reads(self) -> dict[str, str]:
        """``{read port: key}``, every default filled in."""
        return {port: self._reads.get(port) or self.key(port) for port in self.ports}

    @property
    def required(self) -> set[str]:
        """The ports without a default, and the optional ones that ``reads`` names."""
        return {port for port, optional in self.ports.items() if not optional or port in self._reads}

    @property
    def writes(self) -> dict[str, str]:
        """``{write port: key}`` of what this block writes in training."""
        return {port: key or self.key(port) for port, key in self._writes.items()}

    def writes_in(self, inference: bool) -> dict[str, str]:
        """``{write port: key}`` of the training graph or of the inference graph."""
        if not inference or self.inference_outputs is None:
            return self.writes
        return {port: self._writes.get(port) or self.key(port) for port in self.inference_outputs}

    def set_stream(self, stream: str | None) -> None:
        """Take the parent's stream, unless this block has one of its own."""
        if self.stream is None:
            self.stream = stream

    def forward(self, data: Data, inference: bool = False) -> Data:
        """``data`` plus this block's outputs; ``data`` itself is not changed."""
        inputs = {port: data[key] for port, key in self.reads.items() if key in data}
        writes = self.writes_in(inference)
        if self.optional_outputs:
            return data | {writes[p]: v for p, v in self.compute(**inputs, outputs=tuple(writes)).items()}
        out = self.compute(**inputs)
        values = (out,) if len(self.outputs) == 1 else out
        return data | {writes[port]: value for port, value in zip(self.outputs, values, strict=True)}


class Wrap(ReadWriteBlock):
    """Any ``nn.Module`` as a block: ``module(*reads in order) -> writes``.

    Floating-point inputs are cast to the dtype of the module's (first) weight, as the library's own layers do themselves.

    Args:
        module: called with the tensors of ``reads`` in file order; a single tensor, a tuple, or a mapping comes back.
        reads: ``{any name: key}``, in the order of the module's arguments.
        writes: ``{any name: key}``, in the order of what it returns (by name if it returns a mapping).
    """

    def __init__(
        self, module: nn.Module, *, reads: Mapping[str, str], writes: Mapping[str, str], training_only: bool = False
    ) -> None:
        if not reads or not writes:
            raise UserError("Wrap needs reads: {name: key} in the order of the module's arguments, and writes: {name: key}.")
        self._names = tuple(reads)
        self.outputs = tuple(writes)
        super().__init__(reads=reads, writes=writes, training_only=training_only)
        self.module = module

    def read_ports(self) -> dict[str, bool]:
        return dict.fromkeys(self._names, False)

    def compute(self, **ports: Tensor) -> Any:
        weight = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        inputs = [ports[name] for name in self._names]
        if weight is not None:
            inputs = [x.to(weight.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        out = self.module(*inputs)
        return tuple(out[name] for name in self.outputs) if isinstance(out, Mapping) else out
