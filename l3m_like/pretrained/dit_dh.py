"""Names of RAE's DiT^DH (``DiTwDDTHead`` in its published files; ``pos_embed`` and the rotary tables are computed here)."""

from __future__ import annotations

from l3m_like.pretrained.name_map import Source, Templates


def dit_dh_names(layers: int, head_layers: int, *, channels: int, head_channels: int | None = None, patch: int = 1) -> Templates:
    """Names of the generator of ``dit_dh.yaml``: ``layers`` of the trunk and then ``head_layers`` are one list there.

    Args:
        layers, head_layers: their numbers.
        channels, patch: of the latent.
        head_channels: that the head's own embedding sees (None: the same).
    """
    names: dict[str, str | Source] = {
        "preprocessor.patches.projection.proj.weight": Source("s_embedder.proj.weight", shape=(-1, channels, patch, patch)),
        "preprocessor.patches.projection.proj.bias": "s_embedder.proj.bias",
        "trunk.embed.proj.weight": Source("x_embedder.proj.weight", shape=(-1, head_channels or channels, patch, patch)),
        "trunk.embed.proj.bias": "x_embedder.proj.bias",
        "preprocessor.condition.level.features.frequency": "t_embedder.W",
        "preprocessor.condition.level.up.{leaf}": "t_embedder.mlp.0.{leaf}",
        "preprocessor.condition.level.down.{leaf}": "t_embedder.mlp.2.{leaf}",
        "preprocessor.condition.label.weight": "y_embedder.embedding_table.weight",
        "trunk.project.{leaf}": "s_projector.{leaf}",
        "head.norm.weight": "final_layer.norm_final.weight",
        "head.proj.{leaf}": "final_layer.linear.{leaf}",
        "head.modulation.proj.{leaf}": "final_layer.adaLN_modulation.1.{leaf}",
    }
    for place in range(layers + head_layers):
        ours = f"trunk.layers.{place}" if place < layers else f"trunk.head_layers.{place - layers}"
        theirs = f"blocks.{place}"
        names |= {
            f"{ours}.norm_1.weight": f"{theirs}.norm1.weight",
            f"{ours}.mixer.q_proj.{{leaf}}": Source(f"{theirs}.attn.qkv.{{leaf}}", part=0, parts=3),
            f"{ours}.mixer.k_proj.{{leaf}}": Source(f"{theirs}.attn.qkv.{{leaf}}", part=1, parts=3),
            f"{ours}.mixer.v_proj.{{leaf}}": Source(f"{theirs}.attn.qkv.{{leaf}}", part=2, parts=3),
            f"{ours}.mixer.out_proj.{{leaf}}": f"{theirs}.attn.proj.{{leaf}}",
            f"{ours}.norm_2.weight": f"{theirs}.norm2.weight",
            f"{ours}.mlp.gate.{{leaf}}": Source(f"{theirs}.mlp.w12.{{leaf}}", part=0, parts=2),
            f"{ours}.mlp.up.{{leaf}}": Source(f"{theirs}.mlp.w12.{{leaf}}", part=1, parts=2),
            f"{ours}.mlp.down.{{leaf}}": f"{theirs}.mlp.w3.{{leaf}}",
            f"{ours}.modulation.proj.{{leaf}}": f"{theirs}.adaLN_modulation.1.{{leaf}}",
        }
    return names
