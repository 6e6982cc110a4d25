"""What moves: the specification of a fragment, the memory that holds it, and the newest weights."""
