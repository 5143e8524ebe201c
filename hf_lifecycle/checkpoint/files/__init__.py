"""How bytes get to the disk and back: whole, bit for bit, and without running anything."""
