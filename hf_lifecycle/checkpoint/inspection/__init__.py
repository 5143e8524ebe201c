"""What a person asks of a run and its checkpoints, and what a person decides about them."""
