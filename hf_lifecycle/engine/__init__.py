"""How a save becomes a checkpoint, and is proved on a resume, whichever host trains: Trainer, or a loop on Accelerate.

Promise: no module here knows transformers or accelerate. What a host does differently, it passes in.
"""
