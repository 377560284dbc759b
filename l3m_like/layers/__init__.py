"""Tensors in, tensors out: nn.Modules that know no key, no mesh and no config."""

from l3m_like.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "attention": ["Attention"],
        "cache": ["StaticCache", "LayerCache"],
        "diff_augment": ["DiffAugment"],
        "discriminator": ["SpectralConv", "TokenDiscriminator", "PatchDiscriminator"],
        "embedding": ["TimeEmbed", "FourierTimeEmbed"],
        "interpolant": ["Interpolant", "shift_time"],
        "latent_attention": ["LatentAttention"],
        "linear": ["joint_linear"],
        "lora": ["LoRALinear"],
        "lpips": ["LPIPS"],
        "masks": ["AttentionMask", "LayerMasks", "choose_backend", "lower", "attended_pairs"],
        "mlp": ["MLP", "SwiGLU"],
        "modulation": ["Modulation"],
        "moe": ["MoE", "Router", "Routing"],
        "norm": ["RMSNorm", "LayerNorm", "AffineLayerNorm"],
        "patch_embed": ["Colours", "PatchProjection", "patchify", "patch_pixels", "unpatchify", "sincos_positions"],
        "pooling": ["Pool", "AttentionPool"],
        "rope": ["Rope", "MultiAxisRope"],
        "timm_vit": ["TimmViT"],
        "transformer": ["TransformerLayer", "ParallelLayer", "LadderLayer", "DiTLayer"],
    },
)
