"""Generation state, scheduling, KV page accounting and the commit log. Plain Python: no jax, no clock, no sockets."""
