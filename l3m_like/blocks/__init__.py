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
        "preprocessors.mask_patches": ["MaskPatches", "DrawPrefix"],
        "preprocessors.mix_images": ["MixImages"],
        "preprocessors.text_condition": ["DropText", "TimeTextEmbed"],
        "preprocessors.autoencoder_kl": ["AutoencoderKLEncoder", "SampleLatent"],
        "preprocessors.patches": ["PatchEmbed"],
        "preprocessors.image_encoder": ["ImageEncoder", "ImageFeatures"],
        "preprocessors.latents": ["LatentNoise", "NormalizeLatent"],
        "trunks.transformer": ["Transformer"],
        "trunks.dit": ["DiT"],
        "trunks.dit_dh": ["NoiseLevelEmbed", "DiTDH", "TokenPatchDecode"],
        "postprocessors.multi_token": ["MultiTokenPrediction"],
        "postprocessors.decode_patches": ["RestorePatches", "JoinCaption", "SplitCaption"],
        "postprocessors.features": ["Features"],
        "postprocessors.noisy_half": ["NoisyHalf"],
        "heads.language_model": ["LanguageModelHead"],
        "heads.classes": ["ClassHead"],
        "heads.contrast": ["EmbeddingHead", "LogitScale"],
        "heads.distillation": ["TeacherHead", "DistillationHead"],
        "heads.pixels": ["PatchDecode", "PatchHead"],
        "heads.reconstruction": ["PatchPixels", "PerceptualDistance"],
        "heads.discriminator": ["Discriminator"],
        "hf_model": ["HFModel"],
    },
)
