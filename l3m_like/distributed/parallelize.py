"""One function that puts a model on a mesh, in a fixed order: TP -> checkpointing -> compile -> offload -> FSDP per unit -> root.

A layer owns its tensor-parallel plan, a block its repeating units; nothing here knows a class name, and no parameter
changes its name.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.meta_model import Frozen, MetaModel, Tower
from l3m_like.distributed.activations import apply_checkpointing, apply_offload, refuse_hidden
from l3m_like.distributed.compiled import Graphs
from l3m_like.distributed.low_precision import LowPrecision
from l3m_like.distributed.mesh import Mesh
from l3m_like.distributed.tensor_parallel import CutExperts, CutVocabulary, SumGradients

# blocks return new tensors and never write into one in place, so a root that returns views is safe
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

#: how a layer's plan is written -> what torch is told; None: the parameter is whole on every tp rank
TP_STYLES: dict[str, Any] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "experts": CutExperts,
    "divided": SumGradients,
    "replicated": None,
    "summed": None,
    "vocab": CutVocabulary,
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def parallelize(
    part: MetaModel,
    mesh: Mesh,
    *,
    precision: str = "fp32",
    checkpointing: str | int | Mapping[str, Any] = "none",
    compile_units: bool | Graphs = False,
    offload: Mapping[str, int] | None = None,
    reshard_after_forward: bool = True,
) -> MetaModel:
    """Put ``part`` (on the meta device, or materialised) on ``mesh``, in place; returns it.

    Args:
        precision: of the computation: ``fp32``, ``bf16`` (fp32 masters, fp32 gradient reduction) or ``fp64``.
        checkpointing: as ``Checkpointing.of`` takes it.
        compile_units: ``torch.compile`` each repeating unit; a ``Graphs`` also counts what that makes.
        offload: the arguments of ``apply_offload``. None: everything stays on the device.
        reshard_after_forward: free a unit's gathered parameters after its forward (less memory, more communication).
    """
    refuse_batch_norm(part, mesh)
    units = [unit for _, block in part.blocks() for unit in block.shard_units()]
    if mesh.size("tp") > 1:
        apply_tensor_parallel(part, mesh)
        part.retie()
    apply_checkpointing(units, checkpointing)
    if compile_units:
        (compile_units if isinstance(compile_units, Graphs) else Graphs()).compile(units)
    if offload is not None:
        refuse_hidden(checkpointing, compiled=bool(compile_units))
        apply_offload(units, mesh.device, **offload)
    if precision == "fp64":
        part.double()
        part.retie()
    if mesh.world_size > 1:
        refuse_ties_between_units(part)
        apply_fsdp(part, units, mesh, precision, reshard_after_forward)
    elif precision == "bf16":
        LowPrecision(part, DTYPES[precision], leave=_as_stored(part))
    return part


def refuse_batch_norm(part: MetaModel, mesh: Mesh) -> None:
    """Statistics of a batch are those of one rank's micro-batch: the result would depend on how the batch is split."""
    if mesh.world_size == 1:
        return
    frozen = {id(inner) for module in part.modules() if isinstance(module, Frozen) for inner in module.modules()}
    for path, module in part.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and id(module) not in frozen:
            raise UserError(
                f"{path} is {type(module).__name__}, whose statistics would differ from rank to rank. Use GroupNorm or "
                "LayerNorm, or freeze it with l3m_like.core.Frozen."
            )


def apply_tensor_parallel(part: MetaModel, mesh: Mesh) -> None:
    """Apply every layer's own ``tp_plan``; each name is checked, and so is each parameter of a unit that has a plan."""
    planned: set[str] = set()
    for path, module in part.named_modules():
        plan = getattr(module, "tp_plan", None)
        for name, style in (plan() if callable(plan) else {}).items():  # transformers' models have a dict of this name
            where = f"{path}.{name}" if path else name
            if style not in TP_STYLES:
                raise UserError(f"tp_plan of {path}: '{style}' is not a style. {did_you_mean(style, TP_STYLES)}")
            target: Any = _resolve(module, name, path)
            if isinstance(target, nn.Module):
                planned |= {f"{where}.{leaf}" for leaf, _ in target.named_parameters(remove_duplicate=False)}
            else:
                planned.add(where)
            if style == "vocab" and target.weight.shape[0] % mesh.size("tp"):
                continue  # whole on every rank: the parts must be equal, and a published vocabulary is what it is
            if (torch_style := TP_STYLES[style]) is not None:
                _check_divides(target, style, where, mesh.size("tp"))
                with _own_cuts(target, style, mesh):
                    parallelize_module(module, mesh["tp"], {name: torch_style()})
            elif style == "summed":
                leaves = [f"{name}.{leaf}" for leaf, _ in target.named_parameters()] if isinstance(target, nn.Module) else [name]
                module.tp_summed = (*getattr(module, "tp_summed", ()), *leaves)  # read by distributed/gradients.py
    for unit_path, unit in _named_units(part):
        names = [f"{unit_path}.{leaf}" for leaf, _ in unit.named_parameters(remove_duplicate=False)]
        left = [name for name in names if name not in planned]
        if left and len(left) < len(names):
            raise UserError(
                f"tensor parallel: {left[0]} (of {unit_path}) is in no tp_plan. Name every parameter of the unit: "
                "'colwise', 'rowwise', 'replicated', or 'summed' if its gradient is a part of the sum on each tp rank."
            )


@contextmanager
def _own_cuts(layer: Any, style: str, mesh: Mesh) -> Iterator[None]:
    """Torch cuts all parameters of a linear layer in one way; those that the layer's ``tp_cuts`` names are cut as it says."""
    cuts: dict[str, int | None] = layer.tp_cuts(style) if hasattr(layer, "tp_cuts") else {}
    held = {name: layer._parameters.pop(name) for name in cuts}
    yield
    for name, dim in cuts.items():
        whole, placement = held[name], Replicate() if dim is None else Shard(dim)
        cut = distribute_tensor(whole, mesh["tp"], [placement])
        layer.register_parameter(name, nn.Parameter(cut, requires_grad=whole.requires_grad))


def _resolve(module: nn.Module, name: str, path: str) -> nn.Module | nn.Parameter:
    owner, _, leaf = name.rpartition(".")
    try:
        return getattr(module.get_submodule(owner), leaf)
    except AttributeError:
        names = [n for n, _ in module.named_modules() if n] + [n for n, _ in module.named_parameters()]
        where = path or "the model"
        raise UserError(f"tp_plan of {where} names '{name}', which it does not have. {did_you_mean(name, names)}") from None


def _check_divides(target: Any, style: str, where: str, tp: int) -> None:
    if style == "divided":
        return
    if style == "experts":
        for name, dim in target.expert_cuts.items():
            if (size := getattr(target, name).shape[dim]) % tp:
                raise UserError(f"tensor parallel: the experts of {where} are {size} wide, not a multiple of parallel.tp {tp}.")
        return
    size = target.weight.shape[0 if style == "colwise" else 1]
    if size % tp:
        what = "outputs" if style == "colwise" else "inputs"
        raise UserError(f"tensor parallel: {where} has {size} {what}, not a multiple of parallel.tp {tp}.")


def _named_units(part: MetaModel) -> Iterator[tuple[str, nn.Module]]:
    names = {id(module): name for name, module in part.named_modules()}
    for _, block in part.blocks():
        for unit in block.shard_units():
            yield names[id(unit)], unit


def refuse_ties_between_units(part: MetaModel) -> None:
    """FSDP gathers and frees each unit's parameters by themselves, so one cannot be a parameter of another unit as well."""
    units = dict(_named_units(part))
    units |= {f"{path}.model": module.model for path, module in part.named_modules() if isinstance(module, (Frozen, Tower))}
    first: dict[int, tuple[str, str]] = {}
    for name, parameter in part.named_parameters(remove_duplicate=False):
        unit = max((path for path in units if name.startswith(f"{path}.")), key=len, default="the rest of the model")
        other, its_unit = first.setdefault(id(parameter), (name, unit))
        if unit != its_unit:
            raise UserError(
                f"tie: {other} and {name} are one parameter, but {its_unit} and {unit} are sharded apart. Tie parameters of one "
                "unit, or such as are in none (embeddings and heads); or untie these, or run in one process."
            )


def apply_fsdp(part: MetaModel, units: list[nn.Module], mesh: Mesh, precision: str, reshard_after_forward: bool) -> None:
    """FSDP2 per unit, per frozen part or tower, and on the root, summing gradients (no factor of the mesh anywhere)."""
    dtype = DTYPES[precision]
    # inputs are never cast: the data_dict holds times, targets and positions that must stay in fp32
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if precision == "bf16" else None,
        reduce_dtype=torch.float32 if precision == "bf16" else None,
        cast_forward_inputs=False,
    )
    nested = [m for m in part.modules() if isinstance(m, (Frozen, Tower)) and any(True for _ in m.parameters())]
    own = {id(module) for module in _as_stored(part)}
    as_stored = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == "bf16":  # a group has one dtype; a few numbers stay gathered, as those of the root
        for module in part.modules():
            if getattr(module, "full_precision", False):
                fully_shard(module, mesh=mesh.fsdp, mp_policy=as_stored, reshard_after_forward=False)
    # units, then what holds them, from the inside out
    for module in [*units, *(module.model for module in reversed(nested))]:
        chosen = as_stored if id(module) in own else policy
        fully_shard(module, mesh=mesh.fsdp, mp_policy=chosen, reshard_after_forward=reshard_after_forward)
    fully_shard(part, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=False)
    for module in part.modules():
        if isinstance(module, FSDPModule):
            # the loss is already divided by global counts, so gradients are summed over the mesh, and nothing else
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _as_stored(part: nn.Module) -> list[nn.Module]:
    """All modules that read their parameters in the dtype in which these are stored: those of frozen parts with a dtype of their
    own, and those with the attribute ``full_precision``, for numbers that bf16 would round too much."""
    frozen = [inner for m in part.modules() if isinstance(m, Frozen) and m.dtype is not None for inner in m.modules()]
    return [*frozen, *(m for m in part.modules() if getattr(m, "full_precision", False))]


def reshard(model: nn.Module) -> None:
    """Free gathered parameters. A root keeps them after a forward until its backward: if the shards change in between (averaged
    weights are swapped in or out around an evaluation), its next forward would go on with the old ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
