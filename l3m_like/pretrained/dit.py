"""Weight names of DiT and SiT: the published SiT files, and diffusers' ``DiTTransformer2DModel``."""

from __future__ import annotations

from l3m_like.pretrained.name_map import Source


def sit_names(num_layers: int, *, dim: int, channels: int, patch: int) -> dict[str, Source]:
    """Names in SiT's own checkpoints (``pos_embed`` there is a constant, computed here)."""
    names = {
        "preprocessor.patches.projection.proj.weight": Source("x_embedder.proj.weight", shape=(dim, channels, patch, patch)),
        "preprocessor.patches.projection.proj.bias": Source("x_embedder.proj.bias"),
        "preprocessor.condition.label.weight": Source("y_embedder.embedding_table.weight"),
    }
    names |= _linear("preprocessor.condition.time.up", "t_embedder.mlp.0") | _linear(
        "preprocessor.condition.time.down", "t_embedder.mlp.2"
    )
    for i in range(num_layers):
        ours, theirs = f"trunk.layers.{i}", f"blocks.{i}"
        for part, letter in enumerate("qkv"):
            for leaf in ("weight", "bias"):
                names[f"{ours}.mixer.{letter}_proj.{leaf}"] = Source(f"{theirs}.attn.qkv.{leaf}", part=part, parts=3)
        names |= _linear(f"{ours}.mixer.out_proj", f"{theirs}.attn.proj")
        names |= _linear(f"{ours}.mlp.up", f"{theirs}.mlp.fc1") | _linear(f"{ours}.mlp.down", f"{theirs}.mlp.fc2")
        names |= _linear(f"{ours}.modulation.proj", f"{theirs}.adaLN_modulation.1")
    return names | _linear("head.proj", "final_layer.linear") | _linear("head.modulation.proj", "final_layer.adaLN_modulation.1")


def diffusers_names(num_layers: int, *, dim: int, channels: int, patch: int) -> dict[str, Source]:
    """Names in ``DiTTransformer2DModel``, where every block holds a copy of the time and label embedding. Its time sinusoid
    divides by half - 1: set ``downscale_freq_shift = 0`` on every block's ``norm1.emb.time_proj`` for equal outputs."""
    names = {
        "preprocessor.patches.projection.proj.weight": Source("pos_embed.proj.weight", shape=(dim, channels, patch, patch)),
        "preprocessor.patches.projection.proj.bias": Source("pos_embed.proj.bias"),
    }
    shared = {
        "preprocessor.condition.label.weight": "class_embedder.embedding_table.weight",
        "preprocessor.condition.time.up.weight": "timestep_embedder.linear_1.weight",
        "preprocessor.condition.time.up.bias": "timestep_embedder.linear_1.bias",
        "preprocessor.condition.time.down.weight": "timestep_embedder.linear_2.weight",
        "preprocessor.condition.time.down.bias": "timestep_embedder.linear_2.bias",
    }
    for ours, theirs in shared.items():
        every = [f"transformer_blocks.{i}.norm1.emb.{theirs}" for i in range(num_layers)]
        names[ours] = Source(every[0], copies=tuple(every[1:]))
    for i in range(num_layers):
        ours, theirs = f"trunk.layers.{i}", f"transformer_blocks.{i}"
        for letter in "qkv":
            names |= _linear(f"{ours}.mixer.{letter}_proj", f"{theirs}.attn1.to_{letter}")
        names |= _linear(f"{ours}.mixer.out_proj", f"{theirs}.attn1.to_out.0")
        names |= _linear(f"{ours}.mlp.up", f"{theirs}.ff.net.0.proj") | _linear(f"{ours}.mlp.down", f"{theirs}.ff.net.2")
        names |= _linear(f"{ours}.modulation.proj", f"{theirs}.norm1.linear")
    return names | _linear("head.modulation.proj", "proj_out_1") | _linear("head.proj", "proj_out_2")


def _linear(ours: str, theirs: str) -> dict[str, Source]:
    return {f"{ours}.{leaf}": Source(f"{theirs}.{leaf}") for leaf in ("weight", "bias")}
