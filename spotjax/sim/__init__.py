"""Discrete-event simulation of serving on machines that can be taken away, with the planner and policies of the server."""
