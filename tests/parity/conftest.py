"""Reference classes come from transformers and diffusers, which import torchvision."""

from l3m_like.core.torchvision_ops import allow_torchvision

allow_torchvision()
