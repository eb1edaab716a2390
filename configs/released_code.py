"""ViGOS as the authors' released code computes it, where that differs from the paper.

    python -m vigos_jax.main --config configs/released_code.py

- The reasoning teacher never reads the description: its prompt, `<think>`, then only the tokens it scores.
- The perception teacher's turn starts without `<description>`.
- `</think>` and the box belong to the reasoning; validity is more lenient (`find_spans`, rule "released").
- The last description token and the first reasoning token have a clip of their own, which at 0.05 changes nothing.
- Adapters sit on the vision tower's MLPs too, so student and teachers have different towers.

Not reproduced: the frozen teacher's drift (adapters merged into and out of bfloat16 weights every step), shifted spans
where sampled ids are not the tokenizer's own, means of micro-batch means (the same without gradient accumulation), and
the loss of the vision adapters' gradients under re-entrant checkpointing. tests/test_goldens.py has the numbers.
"""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    config = paper.get_config()
    config.span_rule = "released"
    config.prompts.perception.assistant_prefill = ""
    config.roles.perception.last_clip = 0.05
    config.prompts.reasoning.assistant_prefill = "<think>"
    config.roles.reasoning.reads = "scored"
    config.roles.reasoning.first_clip = 0.05
    config.lora.scope = "official"
    return config
