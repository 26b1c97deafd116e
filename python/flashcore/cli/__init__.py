"""The commands of `python -m flashcore`, one file each."""
