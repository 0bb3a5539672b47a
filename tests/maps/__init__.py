"""The map types: each by itself, and what they have in common."""
