"""How a custom loop goes on from a checkpoint: what differs, what is loaded and proved."""
