"""Tuning: which of the kernels that are built is the best for a problem (`rows`, `files`), and the search for better
tiles of the Hopper kernel, which compiles them (`space`, `compile`, `judge`, `search`, `state`, `proposal`)."""
