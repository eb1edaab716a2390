"""Package metadata. Lower bounds say what is known to work; `constraints/` says what is tested."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "vigos_jax/__init__.py").read_text(), re.M).group(1)

RUN = [
    # The next jax minor may move an API: raise the upper bound once the tests pass on it.
    "jax>=0.10.2,<0.13",
    "flax>=0.12",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "grain>=0.2.18",
    "jaxtyping>=0.3.11",  # shapes in annotations
    "numpy>=2.0",
    "ml-collections>=1.1",
    "absl-py>=2.1",
    "transformers>=5.20",
    "tokenizers>=0.22",
    "huggingface_hub>=1.31",
    "safetensors>=0.8",
    "jinja2>=3.1",  # chat templates; transformers does not ask for it
    "pillow>=11",
    "datasets>=4.0",
    "pyarrow>=18",
    "tqdm>=4.66",
    "qwix>=0.1.8,<0.2",  # codes of a quantised base; brings nothing that is not here
    "math-verify>=0.8",  # compares expressions, in a process of its own
]

# The compiler for TPUs that jax[tpu] names for the lowest jax above; there is none but for Linux.
LIBTPU = "libtpu>=0.0.42,<0.1; sys_platform == 'linux'"

# The compiler for GPUs, of the same version as jax, and what it loads: cuDNN for attention, ptxas. Only for Linux.
GPU_COMPILER = [
    "jax-cuda13-plugin>=0.10.2,<0.13; sys_platform == 'linux'",
    "jax-cuda13-pjrt>=0.10.2,<0.13; sys_platform == 'linux'",
    "nvidia-cudnn-cu13>=9.12,<10; sys_platform == 'linux'",
    "nvidia-cuda-nvcc>=13.0.48,<14; sys_platform == 'linux'",
]

# Enough for `make lint` and `make test-fast`.
TEST_CORE = [
    "pytest>=9",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "beartype>=0.23",  # checks the annotated shapes
    "ruff>=0.14",
    "pyrefly>=1.4,<2",  # checks the types
    "openai>=2",  # the judge's client
]

EXTRAS = {
    "test-core": TEST_CORE,
    "test": [
        *TEST_CORE,
        # The reference implementation that parity and export are tested against; never imported at run time.
        "torch==2.13.0",
        "peft>=0.19",
        "accelerate>=1.10",
        # Programs are compiled for TPUs in the tests, too.
        LIBTPU,
        "setuptools>=77",  # builds the wheel that a test installs
        "tensorboard>=2.21",
        "wandb>=0.31",
        # What executes the notebooks.
        "nbclient>=0.10",
        "nbformat>=5.10",
        "ipykernel>=7",
        "jupytext>=1.17",
        "matplotlib>=3.10",
        "scipy>=1.14",
    ],
    # What python -m benchmarks.trl is against, beside `test`; the next minor may move the methods that it times.
    "bench": ["trl>=1.16,<1.17"],
    "plan": [LIBTPU],  # the compiler for TPUs, without a TPU
    "plan-gpu": GPU_COMPILER,  # the compiler for GPUs, without a GPU
    "cuda": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
    "study": ["matplotlib>=3.10", "scipy>=1.14"],  # python -m vigos_jax.miniature.study
    "notebooks": ["matplotlib>=3.10", "ipykernel>=7", "jupytext>=1.17"],
    "judge": ["openai>=2"],  # the client of any server that speaks its protocol
    # make docs. Pinned: a page must look the same tomorrow.
    "docs": ["mkdocs==1.6.1", "mkdocs-material==9.8.2", "mkdocstrings-python==2.0.11", "latex2mathml==3.81.1"],
    "release": ["build>=1.3", "twine>=6.1"],  # CONTRIBUTING.md's checklist
    "tracking": ["tensorboard>=2.21", "wandb>=0.31"],
}

setup(
    name="vigos-jax",
    version=VERSION,
    description="Visually grounded on-policy self-distillation (ViGOS) for vision-language models, in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    classifiers=[f"Programming Language :: Python :: {version}" for version in ("3.11", "3.12", "3.13")],
    packages=find_packages(include=["vigos_jax", "vigos_jax.*", "configs", "configs.*"]),
    package_data={
        "vigos_jax": ["py.typed"],
        "vigos_jax.report": ["*.j2", "*.js"],
        "vigos_jax.demo": ["base/*", "base_reasoning/*"],
    },
    install_requires=RUN,
    extras_require=EXTRAS,
)
