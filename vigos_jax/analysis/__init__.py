"""What a run reads, and what its teachers do on given rollouts: token scores, and the privileged-answer leakage ratio."""
