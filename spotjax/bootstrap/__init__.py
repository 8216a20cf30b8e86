"""What brings a fresh machine into the fleet: start-up scripts and manifests, as text. Runs nothing itself."""
