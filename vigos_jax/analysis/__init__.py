"""What a run's teachers do on given rollouts: scores token by token, and the privileged-answer leakage ratio."""
