"""How a run under Trainer begins: what it resumes from, what differs, what was loaded, what is still due."""
