"""How a save of a custom loop becomes a checkpoint, at once or in the background."""
