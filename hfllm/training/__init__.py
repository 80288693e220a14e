"""Functions for the training loop: optimizers, learning rates, checkpoints, sizing, throughput."""
