"""What ``zrl train`` and ``zrl eval`` run: the training loop, checkpoints, run folders and plots."""
