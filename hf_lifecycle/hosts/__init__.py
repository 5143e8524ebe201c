"""What trains: the Trainer of transformers, or a custom loop on accelerate. Neither host knows the other."""
