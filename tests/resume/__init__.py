"""The exactness matrix: every case is trained unbroken and broken off, and the ends are compared bit for bit."""
