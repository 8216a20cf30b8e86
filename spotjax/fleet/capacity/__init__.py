"""How many machines the fleet should have, of what kind, and how it comes by them: decisions, the ledger, the loop."""
