"""Losses and metrics: blocks that give a sum over this rank's rows, and its denominator from the loader's keys."""

from l3m_like.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "loss": ["Loss"],
        "token": ["TokenNLL"],
        "multi_token": ["AheadNLL"],
        "perplexity": ["Perplexity"],
        "choice": ["ChoiceAccuracy"],
        "flow": ["FlowMatching"],
        "reconstruction": ["PixelL1", "MeanLPIPS", "PSNR"],
        "adversarial": ["FoolDiscriminator", "TellApart"],
        "router": ["LoadBalance", "RowLoadBalance", "RouterZ", "LoadViolation"],
        "distillation": ["Distillation"],
        "masked_diffusion": ["MaskedDiffusion", "MaskedNLL"],
    },
)
