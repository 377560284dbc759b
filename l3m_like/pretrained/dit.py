"""Weight names of DiT and SiT: the published SiT files, and diffusers' ``DiTTransformer2DModel``."""

from __future__ import annotations

from l3m_like.pretrained.name_map import Source, Templates


def sit_names(*, channels: int, patch: int) -> Templates:
    """Names in SiT's own checkpoints (``pos_embed`` there is a constant, computed here)."""
    ours, theirs = "trunk.layers.{i}", "blocks.{i}"
    return {
        "preprocessor.patches.projection.proj.weight": Source("x_embedder.proj.weight", shape=(-1, channels, patch, patch)),
        "preprocessor.patches.projection.proj.bias": "x_embedder.proj.bias",
        "preprocessor.condition.time.up.{leaf}": "t_embedder.mlp.0.{leaf}",
        "preprocessor.condition.time.down.{leaf}": "t_embedder.mlp.2.{leaf}",
        "preprocessor.condition.label.weight": "y_embedder.embedding_table.weight",
        f"{ours}.mixer.q_proj.{{leaf}}": Source(f"{theirs}.attn.qkv.{{leaf}}", part=0, parts=3),
        f"{ours}.mixer.k_proj.{{leaf}}": Source(f"{theirs}.attn.qkv.{{leaf}}", part=1, parts=3),
        f"{ours}.mixer.v_proj.{{leaf}}": Source(f"{theirs}.attn.qkv.{{leaf}}", part=2, parts=3),
        f"{ours}.mixer.out_proj.{{leaf}}": f"{theirs}.attn.proj.{{leaf}}",
        f"{ours}.mlp.up.{{leaf}}": f"{theirs}.mlp.fc1.{{leaf}}",
        f"{ours}.mlp.down.{{leaf}}": f"{theirs}.mlp.fc2.{{leaf}}",
        f"{ours}.modulation.proj.{{leaf}}": f"{theirs}.adaLN_modulation.1.{{leaf}}",
        "head.proj.{leaf}": "final_layer.linear.{leaf}",
        "head.modulation.proj.{leaf}": "final_layer.adaLN_modulation.1.{leaf}",
    }


def diffusers_names(num_layers: int, *, channels: int, patch: int) -> Templates:
    """Names in ``DiTTransformer2DModel``, where every block holds a copy of the time and label embedding. Its time sinusoid
    divides by half - 1: set ``downscale_freq_shift = 0`` on every block's ``norm1.emb.time_proj`` for equal outputs."""

    def in_every_block(name: str) -> Source:
        first, *others = (f"transformer_blocks.{i}.norm1.emb.{name}" for i in range(num_layers))
        return Source(first, copies=tuple(others))

    ours, theirs = "trunk.layers.{i}", "transformer_blocks.{i}"
    return {
        "preprocessor.patches.projection.proj.weight": Source("pos_embed.proj.weight", shape=(-1, channels, patch, patch)),
        "preprocessor.patches.projection.proj.bias": "pos_embed.proj.bias",
        "preprocessor.condition.time.up.{leaf}": in_every_block("timestep_embedder.linear_1.{leaf}"),
        "preprocessor.condition.time.down.{leaf}": in_every_block("timestep_embedder.linear_2.{leaf}"),
        "preprocessor.condition.label.weight": in_every_block("class_embedder.embedding_table.weight"),
        f"{ours}.modulation.proj.{{leaf}}": f"{theirs}.norm1.linear.{{leaf}}",
        f"{ours}.mixer.q_proj.{{leaf}}": f"{theirs}.attn1.to_q.{{leaf}}",
        f"{ours}.mixer.k_proj.{{leaf}}": f"{theirs}.attn1.to_k.{{leaf}}",
        f"{ours}.mixer.v_proj.{{leaf}}": f"{theirs}.attn1.to_v.{{leaf}}",
        f"{ours}.mixer.out_proj.{{leaf}}": f"{theirs}.attn1.to_out.0.{{leaf}}",
        f"{ours}.mlp.up.{{leaf}}": f"{theirs}.ff.net.0.proj.{{leaf}}",
        f"{ours}.mlp.down.{{leaf}}": f"{theirs}.ff.net.2.{{leaf}}",
        "head.modulation.proj.{leaf}": "proj_out_1.{leaf}",
        "head.proj.{leaf}": "proj_out_2.{leaf}",
    }
