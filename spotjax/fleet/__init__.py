"""Instances, epochs and the controller that keeps requests running while instances come and go."""
