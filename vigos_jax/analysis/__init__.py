"""What a run reads, and what its teachers do on given rollouts: token scores, privileged-answer leakage ratio."""
