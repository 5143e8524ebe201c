"""When things happen in a custom training loop on accelerate: epochs, batches, saves and resumes."""
