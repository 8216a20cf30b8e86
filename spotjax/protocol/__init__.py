"""What the controller and its workers say to each other: message structs, no behaviour. Imports no jax."""
