"""The ViGOS paper: teacher roles, prompts, spans, packing, divergences, the loss."""
