"""How bytes get from memory into the layout of stock files: archives, blocks, comparisons."""
