"""RealWorldQA: short questions about photographs."""

from vigos_jax.evaluation.tasks.task import ANSWER, IMAGES, QUESTION, Task, ask_one

TASK = Task("realworldqa", "RealWorldQA", "zli12321/realWorldQA", "test", 765, (QUESTION, ANSWER, IMAGES), ask_one)
