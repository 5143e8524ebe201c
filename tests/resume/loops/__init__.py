"""The loop's matrix: loops of one's own on accelerate, broken off and resumed, beside Accelerate's own recipe."""
