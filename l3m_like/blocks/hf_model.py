"""Any causal language model of the transformers library as one block."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.init import Init, Normal, Ones, Zeros
from l3m_like.kernels.linear_cross_entropy import IGNORE, check_backend, linear_cross_entropy
from l3m_like.kernels.select import selected
from l3m_like.layers.lora import LoRALinear
from l3m_like.layers.masks import AttentionMask, attended_pairs, counted_targets, counted_tokens

ATTENTION = ("auto", "sdpa", "eager", "flex_attention")


class HFModel(ReadWriteBlock):
    """A model class of ``transformers.AutoModelForCausalLM``, from token ids to the negative log-likelihood of the targets.

    Reads   ids [B, S] int64; positions [B, S] int64 (without: 0, 1, 2, ... in each document); document_ids [B, S] int (-1 =
            padding; without: one document per row); targets [B, S] int64, already shifted, -100 = no target (needed for nll);
            places [P] int64, those of S whose logits are written (without: all), which a sampler says
    Writes  nll [B, S] at least float32, 0 where there is no target; logits [B, S or P, V] in the weights' dtype. `writes` says
            which; the inference graph writes the logits.

    Parameters have the names that transformers gives them, below ``model.``; a tied output matrix is no parameter of its own,
    as in published files. No weights are read here: they come from ``init.from``, or are drawn (matrices with the config's
    ``initializer_range``, vectors as the class sets them).

    With ``packed``, a small model of the same class is run when this one is built: another first document must leave the second
    as it is, and it must come out as if it were alone. Classes that let documents mix (recurrent and convolutional layers) are
    refused. The same run tells whether the logits are one matrix product, so that the loss need not hold them all. Losses that a
    class adds by itself (balance of experts) are not part of nll.

    Args:
        config: the fields of a ``config.json`` (``model_type`` and what differs from the class's defaults), or a folder that
            holds one.
        packed: rows hold several documents, which must not see each other. False: a row is one document, whatever the data say.
        attention: "sdpa", "eager" or "flex_attention", as transformers has them; "auto": the first that the class supports.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.

    Raises:
        UserError: no such model; a class that lets documents mix; state that this library cannot hold.
    """

    outputs = ("logits", "nll")
    optional_outputs = ("logits", "nll")
    inference_outputs = ("logits",)

    def __init__(self, config: Mapping[str, Any] | str, *, packed: bool = True, attention: str = "auto", **ports: Any) -> None:
        super().__init__(**ports)
        if attention not in ATTENTION:
            raise UserError(f"HFModel: attention is '{attention}'. {did_you_mean(attention, ATTENTION)}")
        self.packed = packed
        self.backend = check_backend(selected("linear_cross_entropy"))
        self.hf_config = read_config(config)
        self.model = build(self.hf_config, attention)
        self.units = repeating_units(self.model)
        fields = json.dumps(self.hf_config.to_dict(), sort_keys=True, default=str)
        found = probe(fields, attention, _kinds(self.hf_config, self.units))
        if packed and found.mixes:
            raise UserError(
                f"HFModel: {type(self.model).__name__} {found.mixes}, so it cannot be trained on packed rows. Say "
                "`packed: false` and give one document per row (pack: l3m_like.data.OnePerRow)."
            )
        #: whether its layers are attention and products of matrices alone, as far as can be seen
        self.attends = not found.mixes
        #: whether logits = hidden @ matrix^T
        self.plain_head = found.plain_head
        self._untie()
        #: numbers that are no parameters (rotary frequencies): kept here, since a model on the meta device gets its memory later
        self.constants: list[tuple[nn.Module, str, Tensor]] = []
        self._take_constants()

    # ---- building ----------------------------------------------------------------------------------------------------

    def _untie(self) -> None:
        """Leave one name to a tied output matrix, that of the embedding."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if head is not None and head.weight is embedding.weight:
            self.model.set_output_embeddings(TiedHead(embedding, head.bias))
        names: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) in names:
                raise UserError(
                    f"HFModel: {type(self.model).__name__} ties {name} to {names[id(parameter)]}, which is not known."
                )
            names[id(parameter)] = name

    def _take_constants(self) -> None:
        for path, module in self.model.named_modules():
            buffers = {name: value for name, value in module._buffers.items() if value is not None}
            if not buffers:
                continue
            on_meta = any(value.is_meta for value in buffers.values())
            values = _computed(self.model, module, buffers) if on_meta else {name: b.cpu() for name, b in buffers.items()}
            for name, value in values.items():
                del module._buffers[name]
                if name not in module._non_persistent_buffers_set:
                    # in published files: a parameter that is not trained holds it, shards it and saves it
                    if not value.is_floating_point():
                        raise UserError(f"HFModel: {path}.{name} is saved with the weights but is no floating-point number.")
                    module.register_parameter(name, nn.Parameter(buffers[name], requires_grad=False))
                elif not bool(value.isfinite().all()):
                    raise UserError(
                        f"HFModel: {path}.{name} is a constant that {type(self.model).__name__} does not say how to make."
                    )
                else:
                    self.constants.append((module, name, value))
                    object.__setattr__(module, name, value)

    def _constants_to(self, device: torch.device) -> None:
        for module, name, value in self.constants:
            if getattr(module, name).device != device:
                object.__setattr__(module, name, value.to(device))

    # ---- what an author writes ---------------------------------------------------------------------------------------

    def compute(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        targets: Tensor | None = None,
        places: Tensor | None = None,
        *,
        outputs: Sequence[str],
    ) -> dict[str, Tensor]:
        self._constants_to(ids.device)
        if not self.packed:  # positions that begin anew would tell transformers of documents
            positions = document_ids = None
        if positions is None and document_ids is not None:
            positions = positions_of(document_ids)
        mask = None if document_ids is None else document_mask(self.model, document_ids)
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "use_cache": False}
        out: dict[str, Tensor] = {}
        if self.plain_head:
            weight = self.model.get_output_embeddings().weight
            hidden = self.model.base_model(**inputs).last_hidden_state.to(weight.dtype)
            if "logits" in outputs:
                out["logits"] = F.linear(hidden if places is None else hidden.index_select(1, places), weight)
            if "nll" in outputs:
                out["nll"] = linear_cross_entropy(hidden, weight, self._needed(targets), backend=self.backend)
            return out
        logits = self.model(**inputs).logits
        if "logits" in outputs:
            out["logits"] = logits if places is None else logits.index_select(1, places)
        if "nll" in outputs:
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
            nll = F.cross_entropy(scores, self._needed(targets).flatten(), ignore_index=IGNORE, reduction="none")
            out["nll"] = nll.view(ids.shape)
        return out

    def _needed(self, targets: Tensor | None) -> Tensor:
        if targets is None:
            raise UserError(f"HFModel writes nll, which needs the key '{self.reads['targets']}'.")
        return targets

    def shard_units(self) -> Iterable[nn.Module]:
        return self.units

    def bind(self, mesh: Any) -> None:
        if mesh.size("tp") > 1:
            raise UserError("HFModel has no tensor-parallel plan: set parallel.tp: 1 (parallel.dp_shard cuts any model).")

    def flops(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        targets: Tensor | None = None,
        places: Tensor | None = None,
    ) -> int | None:
        """Of matrix products and softmax attention; None (unknown) for a class with other parameters or other attention."""
        config = self.hf_config.get_text_config()
        heads, active = getattr(config, "num_attention_heads", None), _active_experts(config)
        head = self.model.get_output_embeddings()
        products = 0
        for name, parameter in (named for unit in self.units for named in unit.named_parameters()):
            if name.endswith("bias"):
                continue
            if parameter.dim() > 3 or (parameter.dim() == 3 and active is None):
                return None
            if parameter.dim() == 3 and active is not None:
                products += parameter.numel() // parameter.shape[0] * active
            elif parameter.dim() == 2:
                products += parameter.numel()
        widths = _head_widths(config)
        if not heads or widths is None or not self.attends:
            return None
        work = 2 * counted_tokens(ids.shape, document_ids) * products
        work += 2 * counted_targets(ids.shape, targets) * (head.weight.numel() if head is not None else 0)
        document_ids = document_ids if self.packed else None
        batch, length = ids.shape
        pairs = {
            window: attended_pairs(AttentionMask("causal", document_ids, window=window), batch, length, length)
            for window in set(windows_of(config, len(self.units)))
        }
        attended = sum(pairs[window] for window in windows_of(config, len(self.units)))
        return work + 2 * attended * heads * sum(widths)

    def optim_spec(self) -> dict[str, str | int]:
        tables = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        return {name: "adamw" for name, p in self.named_parameters() if any(t is not None and p is t.weight for t in tables)}

    def init_spec(self) -> dict[str, Init]:
        spec: dict[str, Init] = {}
        std = getattr(self.hf_config.get_text_config(), "initializer_range", None) or 0.02
        for path, module in self.model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if isinstance(module, LoRALinear):  # its adapter says itself how it is drawn
                own = {name: p for name, p in own.items() if not name.startswith("lora_")}
            vectors = {name: p for name, p in own.items() if p.dim() < 2}
            set_by_class = _computed(self.model, module, vectors) if vectors else {}
            for name in own:
                where = f"model.{path}.{name}" if path else f"model.{name}"
                spec[where] = _vector_init(name, set_by_class[name]) if name in vectors else Normal(std)
        return spec


class TiedHead(nn.Module):
    """The output projection [.., D] -> [.., V] by the matrix of ``embedding``, which owns it."""

    def __init__(self, embedding: nn.Module, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias
        self._embedding = (embedding,)  # in a tuple, so that its parameters have one name

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Given(Init):
    """The given values, of a vector."""

    values: Tensor

    def draw(
        self, seed: int, name: str, index: Sequence[Tensor], shape: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        values = self.values.to(dtype)
        return values[index[0].to(values.device)].to(index[0].device) if index else values


def _vector_init(name: str, values: Tensor) -> Init:
    """What the class sets a vector to; what it leaves to torch is 1 (weights) or 0."""
    if bool(values.isnan().any()):
        return Ones() if name.endswith("weight") else Zeros()
    if bool((values == 1).all()):
        return Ones()
    return Zeros() if bool((values == 0).all()) else Given(values)


def _computed(model: Any, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What transformers' own initialisation of ``module`` sets ``tensors`` of it to (CPU, NaN where it does not)."""
    twin: Any = copy.copy(module)
    twin._parameters = {
        n: None if p is None else nn.Parameter(p.detach().to("meta"), False) for n, p in module._parameters.items()
    }
    twin._buffers = dict(module._buffers)
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        empty = torch.full(tensor.shape, torch.nan if tensor.is_floating_point() else 0, dtype=tensor.dtype, device="cpu")
        if name in module._parameters:
            made[name] = twin._parameters[name] = nn.Parameter(empty, requires_grad=False)
        else:
            made[name] = twin._buffers[name] = empty
    with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
        model._init_weights(twin)
    return {name: tensor.detach() for name, tensor in made.items()}


# ---- the model of a config ---------------------------------------------------------------------------------------------


def _transformers() -> Any:
    """The library, imported when it is needed: that takes seconds."""
    from l3m_like.core.torchvision_ops import allow_torchvision

    allow_torchvision()
    import transformers

    return transformers


def read_config(config: Mapping[str, Any] | str) -> Any:
    """A ``PreTrainedConfig`` of the fields of a ``config.json``, or of a folder with one (the only file that is read)."""
    library = _transformers()
    if isinstance(config, str):
        try:
            return library.AutoConfig.from_pretrained(config, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"HFModel: config = {config}: {error}") from error
    fields = dict(config)
    kind = fields.pop("model_type", None)
    known = sorted(library.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if kind not in known:
        raise UserError(f"HFModel: config.model_type is {kind!r}, no causal language model. {did_you_mean(str(kind), known)}")
    made = library.AutoConfig.for_model(kind)
    source = inspect.getsource(importlib.import_module(library.AutoModelForCausalLM._model_mapping[type(made)].__module__))
    for name in fields:
        # some fields of published files are known to the modeling code alone
        if not hasattr(made, name) and name not in type(made).attribute_map and f'"{name}"' not in source:
            raise UserError(f"HFModel: {type(made).__name__} has no field '{name}'. {did_you_mean(name, made.to_dict())}")
    return library.AutoConfig.for_model(kind, **fields)


def build(config: Any, attention: str) -> Any:
    """The model of ``config`` on the default device, without a cache."""
    for rope in _rope_settings(config):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            raise UserError(
                f"HFModel: rope_type '{rope['rope_type']}' chooses frequencies by the longest row of a batch, so that a row "
                "would depend on its neighbours. Choose another, such as 'yarn' or 'llama3'."
            )
    config = copy.deepcopy(config)
    try:
        chosen = {} if attention == "auto" else {"attn_implementation": attention}
        return _transformers().AutoModelForCausalLM.from_config(config, dtype=torch.float32, **chosen)
    except (ValueError, ImportError, KeyError) as error:
        raise UserError(f"HFModel: the model of this config cannot be built: {error}") from error


def _rope_settings(config: Any) -> list[Mapping[str, Any]]:
    """The rotary settings of all layers: one dict, or one for each type of layer."""
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [value for value in found.values() if isinstance(value, Mapping)] or [found]


def repeating_units(model: Any) -> list[nn.Module]:
    """The modules of the classes that transformers itself does not split over devices, else the longest list of layers."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    units = [module for module in model.modules() if type(module).__name__ in names]
    inner = {id(below) for unit in units for below in unit.modules() if below is not unit}
    units = [unit for unit in units if id(unit) not in inner and not isinstance(unit, nn.Embedding)]
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return units or max(lists, key=len, default=[])


def positions_of(document_ids: Tensor) -> Tensor:
    """Positions [B, S] int64 from 0 in each document of document ids [B, S]."""
    place = torch.arange(document_ids.shape[1], device=document_ids.device).expand(document_ids.shape)
    begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return place - torch.where(begins, place, 0).cummax(1).values


def document_mask(model: Any, document_ids: Tensor) -> Any:
    """Masks for every type of layer of ``model``, in the form that its forward takes: its own rule, and the same document."""
    from transformers.masking_utils import create_masks_for_generate, packed_sequence_mask_function

    like = model.get_input_embeddings().weight
    shape = torch.empty((*document_ids.shape, 1), dtype=like.dtype, device=document_ids.device)
    same = packed_sequence_mask_function(document_ids)
    return create_masks_for_generate(model.config, shape, None, None, and_mask_function=same)


# ---- what a class does, found out by running a small one ---------------------------------------------------------------


@dataclass(frozen=True)
class Probed:
    """Why documents of a row see each other (None: they do not), and whether the logits are one product with a matrix."""

    mixes: str | None
    plain_head: bool


#: lengths of the two documents, and a window that is shorter than both
_FIRST, _SECOND, _WINDOW = 5, 9, 4
#: sizes that no other size depends on, in most classes
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner")


@functools.lru_cache(maxsize=32)
def probe(config_json: str, attention: str, layers: int) -> Probed:
    """Run a model of the first ``layers`` layers, few words and narrow MLPs on two packed documents, in float32 on the CPU."""
    fields = json.loads(config_json)
    kind = fields["model_type"]
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = _small(kind, fields, attention, layers)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter *= 4  # initial weights mix so little that a leak would be small
        ids = torch.randint(0, 32, (2, _FIRST + _SECOND))
        ids[1, _FIRST:] = ids[0, _FIRST:]
        document_ids = torch.tensor([[0] * _FIRST + [1] * _SECOND]).expand(2, -1)
        packed = {"input_ids": ids, "position_ids": positions_of(document_ids), "use_cache": False}
        mixes: str | None = None
        try:
            hidden = model.base_model(**packed, attention_mask=document_mask(model, document_ids)).last_hidden_state
        except Exception as error:  # whatever a class raises that takes no such masks
            hidden, mixes = None, f"takes no mask of documents ({type(error).__name__}: {error})"
        alone = model.base_model(input_ids=ids[:1, _FIRST:], use_cache=False).last_hidden_state
        if hidden is not None:
            bound = 1e-4 * float(alone.abs().max())
            one, other = hidden[:, _FIRST:]
            changes = float((one - other).abs().max())
            differs = float((one - alone[0]).abs().max())
            mixes = (
                "lets a document see those before it" if not changes <= bound
                else "computes another result for a document behind others than for it alone" if not differs <= bound
                else None
            )  # fmt: skip
        head = model.get_output_embeddings()
        logits = model(input_ids=ids[:1, _FIRST:], use_cache=False).logits
        product = None if head is None else F.linear(alone, head.weight)
        plain = product is not None and product.shape == logits.shape
        plain = plain and float((product - logits).abs().max()) <= 1e-5 * float(logits.abs().max())
    return Probed(mixes, bool(plain))


def _small(kind: str, fields: Mapping[str, Any], attention: str, layers: int) -> Any:
    library = _transformers()
    other_names = library.AutoConfig.for_model(kind).attribute_map
    number, words = (other_names.get(name, name) for name in ("num_hidden_layers", "vocab_size"))
    small = {name: None if name.endswith("_token_id") else value for name, value in fields.items()}
    small |= {name: value[:layers] for name, value in fields.items() if "layer" in name and isinstance(value, list)}
    small |= {number: layers, words: 32}
    small |= {name: _WINDOW for name in ("sliding_window", "attention_chunk_size") if fields.get(name) is not None}
    narrow = small | {name: 32 for name in _WIDTHS if isinstance(fields.get(name), int)}
    last: Exception | None = None
    for choice in (narrow, small):  # where a width is bound to another one, it stays
        try:
            model = build(library.AutoConfig.for_model(**{"model_type": kind, **choice}), attention).eval()
            model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
            return model
        except Exception as error:
            last = error
    raise UserError(f"HFModel: a small {kind} cannot be run on the CPU to see what it does with documents: {last}") from last


def _kinds(config: Any, units: Sequence[nn.Module]) -> int:
    """How many of the first layers have all kinds of layers among them."""
    types = getattr(config.get_text_config(), "layer_types", None) or [None] * len(units)
    seen: dict[Any, int] = {}
    for number, unit in enumerate(units):
        inside = tuple((name, type(module).__name__) for name, module in unit.named_modules())
        seen.setdefault((inside, types[number] if number < len(types) else None), number + 1)
    return max(seen.values(), default=1)


# ---- FLOPs -------------------------------------------------------------------------------------------------------------


def _active_experts(config: Any) -> int | None:
    """Experts that a token goes through."""
    return next(
        (n for n in (getattr(config, name, None) for name in ("num_experts_per_tok", "top_k_experts", "moe_k")) if n), None
    )


def _head_widths(config: Any) -> tuple[int, int] | None:
    """Width of a head's queries and of its values."""
    if getattr(config, "kv_lora_rank", None):  # latent attention
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    return None if width is None else (width, width)


def windows_of(config: Any, layers: int) -> list[int | None]:
    """The sliding window of every layer (None: it sees all)."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return [window] * layers
    return [window if kind == "sliding_attention" else None for kind in types]
