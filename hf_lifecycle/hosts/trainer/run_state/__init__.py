"""What a run under Trainer has beside its weights: position, randomness, data, losses, plain values."""
