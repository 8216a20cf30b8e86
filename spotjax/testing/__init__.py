"""Stand-ins for what a test, or a laptop, does not have: a scripted service, and fakes of the clouds' interfaces."""
