"""Which batch of which loader a custom loop is at, in whatever order its program asks for batches."""
