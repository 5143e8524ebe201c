"""How a save of Trainer's becomes a checkpoint: where it is written, and what a background save consists of."""
