"""How bytes leave the training loop: copied while training continues, and written in the layout of stock files."""
