"""How a custom loop continues from a checkpoint: what differs, what is loaded and proved."""
