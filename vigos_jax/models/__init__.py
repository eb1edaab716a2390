"""The vision-language models as pure Flax modules, and what tells one family from another."""
