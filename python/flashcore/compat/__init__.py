"""Other libraries' names for attention, computed by flashcore."""
