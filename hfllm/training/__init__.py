"""What a training loop calls: the optimizer, the learning rate, checkpoints, evaluation, throughput."""
