"""How clouds say that a machine will be taken: one source for each way, and what all of them say together."""
