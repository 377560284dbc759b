"""Thin blocks: names of keys around layers."""

from l3m_like.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "preprocessors.text": ["TokenEmbed", "PlacedTokenEmbed"],
        "preprocessors.noise": ["FlowNoise"],
        "preprocessors.mask_tokens": ["MaskTokens"],
        "preprocessors.clean_copy": ["CleanCopy"],
        "preprocessors.labels": ["DropLabel", "TimeLabelEmbed"],
        "preprocessors.patches": ["PatchEmbed"],
        "preprocessors.image_encoder": ["ImageEncoder", "ImageFeatures"],
        "preprocessors.latents": ["LatentNoise", "LatentEmbed", "NormalizeLatent"],
        "trunks.transformer": ["Transformer"],
        "trunks.dit": ["DiT"],
        "trunks.dit_dh": ["NoiseLevelEmbed", "DiTDH", "TokenPatchDecode"],
        "postprocessors.multi_token": ["MultiTokenPrediction"],
        "postprocessors.noisy_half": ["NoisyHalf"],
        "heads.language_model": ["LanguageModelHead"],
        "heads.distillation": ["TeacherHead", "DistillationHead"],
        "heads.pixels": ["PatchDecode"],
        "heads.reconstruction": ["PatchPixels", "PerceptualDistance"],
        "heads.discriminator": ["Discriminator"],
        "hf_model": ["HFModel"],
    },
)
