"""MathVista, testmini: visual mathematics, options and numbers with a stated precision."""

from vigos_jax.evaluation.tasks.task import ANSWER, IMAGES, QUESTION, Task, ask_one

TASK = Task(
    "mathvista", "MathVista", "zli12321/mathvista", "test", 1000, (QUESTION, ANSWER, IMAGES), ask_one, judged=True
)
