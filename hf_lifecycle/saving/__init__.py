"""How bytes leave the training loop: copied while training goes on, and written in the layout of stock files."""
