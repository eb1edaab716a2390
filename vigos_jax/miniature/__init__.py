"""The experiment in miniature: how the demo's base was made, and the study of every method on it."""
