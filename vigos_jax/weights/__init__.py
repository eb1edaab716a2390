"""Hugging Face weights in and out, tensor by tensor."""
