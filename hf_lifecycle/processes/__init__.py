"""The processes of one training: what they tell each other, which signals end them, how they are started."""
