"""MMSI-Bench: spatial reasoning over several images."""

from vigos_jax.evaluation.tasks.task import ANSWER, IMAGES, QUESTION, Task, ask_one

TASK = Task("mmsi", "MMSI", "zli12321/MMSI", "test", 1000, (QUESTION, ANSWER, IMAGES), ask_one)
