"""Discrete-event simulation of serving on machines that can be taken away, with the policies of the real server."""
