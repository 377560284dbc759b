"""Samplers over the blocks that train: the inference graph of a model, fed with the keys that its data would have written."""

from l3m_like.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "sampler": ["Sampler", "Samples"],
        "autoregressive": ["Autoregressive", "Texts"],
        "masked_diffusion": ["MaskedDiffusion"],
        "flow": ["FlowODE", "FlowSDE", "Images", "grid"],
        "autoencoder": ["decode_latents", "latent_statistics"],
        "latents": ["LatentDecoder"],
        "likelihood": ["FlowLikelihood", "bits_per_dimension"],
    },
)
