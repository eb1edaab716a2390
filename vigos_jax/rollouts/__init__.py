"""Completions of prompts: the engine protocol, the native sampler, parsing."""
