"""Carries out migration plans: brings every slice to the device that needs it and leaves in place what is in place."""
