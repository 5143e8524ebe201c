"""When things happen in a loop of one's own on accelerate: epochs, batches, saves and resumes."""
