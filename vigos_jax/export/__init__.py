"""Checkpoints written as Hugging Face folders, loaded again and compared, with a model card."""
