"""The training loop: step, batches, checkpoints, guards, snapshots, logs."""
