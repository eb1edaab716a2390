"""MathVerse, testmini: the same problems with more and more of them in the image (`problem_version`)."""

from vigos_jax.evaluation.tasks.task import ANSWER, IMAGES, QUESTION, Task, ask_one

TASK = Task(
    "mathverse", "MathVerse", "zli12321/mathverse", "test", 3940, (QUESTION, ANSWER, IMAGES), ask_one, judged=True
)
