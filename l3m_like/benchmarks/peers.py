"""What other libraries make of the same model: the peers that a benchmark compares with.

A peer computes the loss of one micro-batch with the sizes, the weights and the batches of a run. Each variant is set up as its
own users would for speed, and says how (``flags``). Libraries are imported where they are used.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from l3m_like.blocks import DiT, LanguageModelHead, PatchDecode, PatchEmbed, TimeLabelEmbed, TokenEmbed, Transformer
from l3m_like.blocks.preprocessors.labels import DropLabel
from l3m_like.blocks.preprocessors.noise import FlowNoise
from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.meta_model import MetaModel
from l3m_like.core.torchvision_ops import allow_torchvision
from l3m_like.layers import MLP, Attention, DiTLayer, LayerNorm, SwiGLU, TransformerLayer
from l3m_like.layers.embedding import sinusoid
from l3m_like.layers.patch_embed import sincos_positions, unpatchify
from l3m_like.losses import FlowMatching, TokenNLL
from l3m_like.pretrained.decoder import NAMES
from l3m_like.pretrained.dit import diffusers_names
from l3m_like.pretrained.name_map import Templates
from l3m_like.pretrained.sit import sit_names
from l3m_like.training.train import Plan

Batch = Mapping[str, Tensor]

# ---- the models that have peers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder of llm.yaml's family."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    theta: float
    norm_eps: float
    qk_norm: bool
    tied: bool

    #: micro-batches that are tried
    micro = (1, 2, 4, 8, 16)
    #: the keys of a batch that a peer reads
    keys = ("text_ids", "text_targets", "text_positions")


@dataclass(frozen=True)
class Diffusion:
    """The sizes of a diffusion transformer of sit.yaml's family."""

    dim: int
    layers: int
    heads: int
    mlp_dim: int
    patch: int
    image_size: int
    channels: int
    out_channels: int
    classes: int
    label_dropout: float

    micro = (32, 64, 128)
    keys = ("image", "image_label", "row")


def sizes_of(cfg: RunConfig, run: Plan) -> Decoder | Diffusion:
    """The sizes of the run's model, from its layers.

    Raises:
        UserError: a model or a training without a peer.
    """
    model = run.model
    plain = isinstance(model, MetaModel) and len(run.updates) == len(run.losses) == 1
    adamw = cfg.optim.name == "adamw" and not (cfg.optim.groups or cfg.optim.no_decay or cfg.optim.layer_decay)
    if plain and adamw and not cfg.updates:
        found = _decoder(model, run) or _diffusion(model, run)
        if found is not None:
            return found
    raise UserError(
        "--compare: there are peers for the decoders of llm.yaml (TokenEmbed; a causal Transformer of RMSNorm, Attention with "
        "rotary positions and SwiGLU; TokenNLL) and the diffusion transformers of sit.yaml (linear FlowNoise, DropLabel, "
        "PatchEmbed, DiT of Attention and MLP, FlowMatching), with one loss of weight 1, AdamW, and no optim.groups, "
        f"optim.no_decay, optim.layer_decay or updates. This run ({cfg.experiment}) is another: compare it by --overhead, or "
        "change it."
    )


def _decoder(model: Any, run: Plan) -> Decoder | None:
    embed, trunk, head, (loss,) = model.preprocessor, model.trunk, model.head, run.losses.values()
    if not (isinstance(embed, TokenEmbed) and isinstance(trunk, Transformer) and isinstance(head, LanguageModelHead)):
        return None
    layers: list[Any] = list(trunk.layers)
    mixer, mlp, rope = layers[0].mixer, layers[0].mlp, trunk.rope
    fits = (
        all(isinstance(layer, TransformerLayer) for layer in layers)
        and all(isinstance(layer.mixer, Attention) and isinstance(layer.mlp, SwiGLU) for layer in layers)
        and len({_shapes(layer) for layer in layers}) == 1
        and mixer.q_proj.bias is None
        and mixer.out_proj.bias is None
        and rope is not None
        and rope.scaling is None
        and trunk.mask == "causal"
        and head.norm.eps == layers[0].norm_1.eps
        and type(loss) is TokenNLL
        and loss.weight == 1
    )
    if not fits or rope is None:
        return None
    return Decoder(
        vocab_size=embed.embed.num_embeddings,
        dim=trunk.dim,
        layers=len(layers),
        heads=mixer.num_heads,
        kv_heads=mixer.num_kv_heads,
        head_dim=mixer.head_dim,
        mlp_dim=mlp.hidden_dim,
        theta=rope.theta,
        norm_eps=head.norm.eps,
        qk_norm=mixer.q_norm is not None,
        tied=head.proj.weight is embed.embed.weight,
    )


def _diffusion(model: Any, run: Plan) -> Diffusion | None:
    parts, trunk, head, (loss,) = model.preprocessor, model.trunk, model.head, run.losses.values()
    if not (isinstance(parts, nn.ModuleDict) and isinstance(trunk, DiT) and isinstance(head, PatchDecode)):
        return None
    kinds: dict[type, Any] = {type(block): block for block in parts.values()}
    layers: list[Any] = list(trunk.layers)
    mixer, mlp = layers[0].mixer, layers[0].mlp
    fits = (
        set(kinds) == {FlowNoise, DropLabel, PatchEmbed, TimeLabelEmbed}
        and all(isinstance(layer, DiTLayer) and isinstance(layer.norm_1, LayerNorm) for layer in layers)
        and all(isinstance(layer.mixer, Attention) and isinstance(layer.mlp, MLP) for layer in layers)
        and len({_shapes(layer) for layer in layers}) == 1
        and {norm.eps for layer in layers for norm in (layer.norm_1, layer.norm_2)} == {1e-6}
        and mixer.q_norm is None
        and mixer.q_proj.bias is not None
        and mixer.num_heads == mixer.num_kv_heads
        and mixer.num_heads * mixer.head_dim == trunk.layers[0].modulation.dim
        and mlp.activation == "gelu_tanh"
        and type(loss) is FlowMatching
        and loss.weight == 1
    )
    if not fits:
        return None
    noise, drop, patches, condition = (kinds[kind] for kind in (FlowNoise, DropLabel, PatchEmbed, TimeLabelEmbed))
    if (noise.interpolant.path, noise.interpolant.prediction, noise.times, noise.shift) != ("linear", "velocity", "uniform", 1):
        return None
    return Diffusion(
        dim=patches.dim,
        layers=len(layers),
        heads=mixer.num_heads,
        mlp_dim=mlp.hidden_dim,
        patch=head.patch,
        image_size=head.image_size,
        channels=head.channels,
        out_channels=head.proj.out_features // head.patch**2,
        classes=condition.label.num_embeddings - 1,
        label_dropout=drop.probability,
    )


def _shapes(layer: nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())


# ---- peers -----------------------------------------------------------------------------------------------------------------


@dataclass
class Peer:
    """One variant of a peer, on a device, with weights of its own.

    Args:
        module: its parameters, fp32.
        loss: ``loss(batch on the device, count)``: the sum over a micro-batch over ``count``, a device scalar.
        count: elements that the sum is over, of a micro-batch.
        names: where our parameters lie in ``module``.
        flags: how it was set up.
        attention: kernels of scaled_dot_product_attention, the first that can is taken; empty: torch chooses.
    """

    module: nn.Module
    loss: Callable[[Batch, Tensor], Tensor]
    count: Callable[[Batch], int]
    names: Templates
    flags: str
    attention: Sequence[SDPBackend] = ()
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def kernels(self) -> contextlib.AbstractContextManager[Any]:
        return sdpa_kernel(list(self.attention), set_priority=True) if self.attention else contextlib.nullcontext()

    def close(self) -> None:
        """Undo what the variant changed in its libraries."""
        self.undo.close()


_CUDNN = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_FLASH = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True)
class Variant:
    """How a peer is made.

    Args:
        package: what must be installed.
        make: ``make(sizes, device, documents)``; documents: rows hold several, or padding.
        default: whether it is tried where no names are given.
    """

    package: str
    make: Callable[[Any, torch.device, bool], Peer]
    default: bool = True


def variants_of(sizes: Decoder | Diffusion) -> dict[str, Variant]:
    return DECODERS if isinstance(sizes, Decoder) else DIFFUSION


def chosen_variants(sizes: Decoder | Diffusion, names: Sequence[str] | None) -> tuple[dict[str, Variant], dict[str, str]]:
    """The variants to try, and of those that cannot be, why.

    Raises:
        UserError: an unknown name, a named one that is not installed, or none left.
    """
    known = variants_of(sizes)
    for name in names or ():
        if name not in known:
            raise UserError(f"--peer {name}: no such variant. {did_you_mean(name, known)}")
    wanted = names or [name for name, variant in known.items() if variant.default]
    missing = {name: f"{known[name].package} is not installed" for name in wanted if not _installed(known[name].package)}
    if missing and (names or len(missing) == len(wanted)):
        name, why = next(iter(missing.items()))
        others = [other for other, variant in known.items() if _installed(variant.package)]
        instead = f", or choose another of {', '.join(others)}" if others else ""
        raise UserError(f"--peer {name}: {why}. Install it (pip install {known[name].package.replace('_', '-')}){instead}.")
    return {name: known[name] for name in wanted if name not in missing}, missing


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def versions() -> dict[str, str]:
    """Of the libraries that may be peers."""
    found = {}
    for package in ("transformers", "liger-kernel", "diffusers", "timm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _order(attention: Sequence[SDPBackend]) -> str:
    return f"first of {', '.join(b.name.removesuffix('_ATTENTION') for b in attention)}" if attention else "torch's choice"


def _compiled(function: Callable[..., Any], wanted: bool) -> Callable[..., Any]:
    # every shape is compiled for itself: a micro-batch has one
    return torch.compile(function, dynamic=False) if wanted else function


# ---- decoders: transformers ------------------------------------------------------------------------------------------------


def _causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> Any:
    """transformers' own function without a mask, so that it says is_causal. A compiled model would otherwise make a dense mask:
    whether the positions are those of packed documents is not asked while it is traced, but assumed."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, None, **settings)


def transformers_family(sizes: Decoder) -> tuple[str, str, Any, Any]:
    """``(family, prefix of its classes, its modeling module, a config of these sizes)`` in transformers."""
    allow_torchvision()
    family, prefix = ("qwen3", "Qwen3") if sizes.qk_norm else ("llama", "Llama")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    config = getattr(configuration, f"{prefix}Config")(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.dim,
        intermediate_size=sizes.mlp_dim,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=1 << 20,
        rms_norm_eps=sizes.norm_eps,
        tie_word_embeddings=sizes.tied,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.theta},
    )
    return family, prefix, modeling, config


def transformers_decoder(
    sizes: Decoder,
    device: torch.device,
    documents: bool,
    *,
    compiled: str = "",
    liger: bool = False,
    stock: bool = False,
    attention: Sequence[SDPBackend] = _CUDNN,
) -> Peer:
    """``Qwen3ForCausalLM`` (without QK-norm ``LlamaForCausalLM``).

    Args:
        compiled: "model" (with the loss), "layers", or "".
        liger: with Liger's kernels, logits and cross-entropy fused.
        stock: with the mask that transformers makes, instead of being told that rows are causal.
        attention: kernels in order of preference.
    """
    family, prefix, modeling, config = transformers_family(sizes)
    from transformers import AttentionInterface

    AttentionInterface.register("l3m_like_causal", _causal_attention)
    config.use_cache = False
    config._attn_implementation = "sdpa" if documents or stock else "l3m_like_causal"
    with contextlib.ExitStack() as changes:
        if liger:
            changes.enter_context(_liger(family, modeling, f"{prefix}ForCausalLM"))
        with torch.device(device):
            model = getattr(modeling, f"{prefix}ForCausalLM")(config).train()
        undo = changes.pop_all()  # until the peer is closed
    if compiled == "layers":
        for layer in model.model.layers:
            layer.compile()

    def objective(ids: Tensor, targets: Tensor, positions: Tensor | None, count: Tensor) -> Tensor:
        # the targets are shifted already, as transformers' own context parallelism hands them over
        shifted = {"labels": targets, "shift_labels": targets, "num_items_in_batch": count}
        return model(input_ids=ids, position_ids=positions, use_cache=False, **shifted).loss

    run = _compiled(objective, compiled == "model")

    def loss(batch: Batch, count: Tensor) -> Tensor:
        return run(batch["text_ids"], batch["text_targets"], batch["text_positions"] if documents else None, count)

    how = {"model": "torch.compile of model and loss", "layers": "torch.compile per layer", "": "eager"}[compiled]
    mask = "packed rows by position_ids, dense mask" if documents else "transformers' own mask" if stock else "is_causal"
    kernels = "Liger (RMSNorm, RoPE, SwiGLU, fused linear cross-entropy)" if liger else "no Liger"
    return Peer(
        model,
        loss,
        lambda batch: int((batch["text_targets"] != -100).sum()),
        NAMES,
        f"transformers {prefix}ForCausalLM; {how}; {kernels}; attention sdpa ({mask}; {_order(attention)})",
        attention if device.type == "cuda" else (),
        undo,
    )


@contextlib.contextmanager
def _liger(family: str, modeling: Any, model: str) -> Iterator[None]:
    """Liger's kernels in ``modeling`` while inside: it replaces names of the module and the model's forward."""
    import liger_kernel.transformers as liger

    before, forward = dict(vars(modeling)), getattr(modeling, model).forward
    try:
        getattr(liger, f"apply_liger_kernel_to_{family}")(
            rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=True
        )
        yield
    finally:
        for name, value in before.items():
            setattr(modeling, name, value)
        getattr(modeling, model).forward = forward


def _decoder_variant(package: str = "transformers", default: bool = True, **settings: Any) -> Variant:
    return Variant(package, lambda sizes, device, documents: transformers_decoder(sizes, device, documents, **settings), default)


DECODERS = {
    "compiled": _decoder_variant(compiled="model"),
    "stock": _decoder_variant(compiled="model", stock=True, attention=()),
    "compiled-flash": _decoder_variant(compiled="model", attention=_FLASH),
    "layers": _decoder_variant(compiled="layers"),
    "liger-compiled": _decoder_variant("liger_kernel", compiled="layers", liger=True),
    "liger": _decoder_variant("liger_kernel", liger=True),
    "eager": _decoder_variant(default=False),
}

# ---- diffusion transformers: timm, diffusers -------------------------------------------------------------------------------


class TimmDiT(nn.Module):
    """DiT (arXiv:2212.09748) of timm's ``Attention`` and ``Mlp``, with the parameter names of SiT's published checkpoints."""

    def __init__(self, sizes: Diffusion) -> None:
        super().__init__()
        import timm.models.vision_transformer as timm

        dim, patch = sizes.dim, sizes.patch
        self.sizes = sizes
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(sizes.channels, dim, patch, stride=patch)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(sizes.classes + 1, dim)})
        self.blocks = nn.ModuleList(TimmLayer(timm, dim, sizes.heads, sizes.mlp_dim) for _ in range(sizes.layers))
        self.final_layer = nn.ModuleDict(
            {"linear": nn.Linear(dim, patch * patch * sizes.out_channels), "adaLN_modulation": _modulation(dim, 2)}
        )
        side = sizes.image_size // patch
        positions = sincos_positions(side, side, dim, torch.float32, next(self.parameters()).device)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, image: Tensor, time: Tensor, class_id: Tensor) -> Tensor:
        """image [B, C, H, W], time [B], class_id [B] -> [B, out_channels, H, W]."""
        x = self.x_embedder["proj"](image).flatten(2).transpose(1, 2) + self.positions
        condition = self.t_embedder["mlp"](sinusoid(time, 256, torch.float32)) + self.y_embedder["embedding_table"](class_id)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.final_layer["adaLN_modulation"](condition).unsqueeze(1).chunk(2, dim=-1)
        x = self.final_layer["linear"](_normed(x) * (1 + scale) + shift)
        return unpatchify(x, self.sizes.patch, self.sizes.image_size, self.sizes.image_size)


class TimmLayer(nn.Module):
    """One adaLN-Zero layer."""

    def __init__(self, timm: Any, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.attn = timm.Attention(dim, num_heads=heads, qkv_bias=True)
        self.mlp = timm.Mlp(dim, mlp_dim, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = _modulation(dim, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate_1 * self.attn(_normed(x) * (1 + scale_1) + shift_1)
        return x + gate_2 * self.mlp(_normed(x) * (1 + scale_2) + shift_2)


def _modulation(dim: int, number: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, number * dim))


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6)


def timm_diffusion(
    sizes: Diffusion, device: torch.device, documents: bool, *, compiled: bool = True, attention: Sequence[SDPBackend] = _FLASH
) -> Peer:
    allow_torchvision()
    with torch.device(device):
        model = TimmDiT(sizes).train()
    names = sit_names(channels=sizes.channels, patch=sizes.patch)
    flags = "DiT of timm's Attention (scaled_dot_product_attention) and Mlp"
    return _diffusion_peer(sizes, model, model, names, flags, compiled, attention if device.type == "cuda" else ())


def diffusers_diffusion(sizes: Diffusion, device: torch.device, documents: bool, *, compiled: bool = True) -> Peer:
    """``DiTTransformer2DModel``; every layer of it embeds time and class anew."""
    allow_torchvision()
    from diffusers import DiTTransformer2DModel

    if sizes.mlp_dim != 4 * sizes.dim:
        raise UserError(f"--peer diffusers: its MLP is 4 x dim = {4 * sizes.dim} wide, the run's {sizes.mlp_dim}. Use timm.")
    with torch.device(device):
        model: Any = DiTTransformer2DModel(
            num_attention_heads=sizes.heads,
            attention_head_dim=sizes.dim // sizes.heads,
            in_channels=sizes.channels,
            out_channels=sizes.out_channels,
            num_layers=sizes.layers,
            sample_size=sizes.image_size,
            patch_size=sizes.patch,
            num_embeds_ada_norm=sizes.classes,
            norm_eps=1e-6,
        )
    model.train()
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as in SiT
        block.norm1.emb.class_embedder.dropout_prob = 0  # labels are dropped before
    model.to(device)  # its table of positions is made on the CPU
    names = diffusers_names(sizes.layers, channels=sizes.channels, patch=sizes.patch)

    def forward(image: Tensor, time: Tensor, class_id: Tensor) -> Tensor:
        return model(image, timestep=time, class_labels=class_id, return_dict=False)[0]

    attention = _FLASH if device.type == "cuda" else ()
    return _diffusion_peer(sizes, model, forward, names, "diffusers DiTTransformer2DModel", compiled, attention)


def _diffusion_peer(
    sizes: Diffusion,
    model: nn.Module,
    forward: Callable[..., Tensor],
    names: Templates,
    flags: str,
    compiled: bool,
    attention: Sequence[SDPBackend],
) -> Peer:
    def objective(noised: Tensor, time: Tensor, class_id: Tensor, velocity: Tensor, count: Tensor) -> Tensor:
        return (forward(noised, time, class_id)[:, : sizes.channels].float() - velocity).square().sum() / count

    run = _compiled(objective, compiled)
    how = "torch.compile of model and loss" if compiled else "eager"
    return Peer(
        model,
        lambda batch, count: run(*noised_batch(batch, sizes), count),
        lambda batch: batch["image"].numel(),
        names,
        f"{flags}; {how}; attention sdpa ({_order(attention)}); noise and times by torch.randn and torch.rand",
        attention,
    )


def noised_batch(batch: Batch, sizes: Diffusion) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(noised image, time, class with some dropped, velocity), drawn as the reference code does, by torch's own generators."""
    image, label = batch["image"], batch["image_label"]
    noise, time = torch.randn_like(image), torch.rand(len(image), device=image.device)
    t = time.view(-1, 1, 1, 1)
    dropped = torch.rand(len(image), device=image.device) < sizes.label_dropout
    return t * image + (1 - t) * noise, time, torch.where(dropped, sizes.classes, label), image - noise


DIFFUSION = {
    "timm": Variant("timm", timm_diffusion),
    "timm-cudnn": Variant("timm", lambda *given: timm_diffusion(*given, attention=_CUDNN)),
    "diffusers": Variant("diffusers", diffusers_diffusion),
    "timm-eager": Variant("timm", lambda *given: timm_diffusion(*given, compiled=False), default=False),
    "diffusers-eager": Variant("diffusers", lambda *given: diffusers_diffusion(*given, compiled=False), default=False),
}
