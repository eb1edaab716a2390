"""vigos_jax: visually grounded on-policy self-distillation for vision-language models, in JAX."""

__version__ = "0.1.0"
