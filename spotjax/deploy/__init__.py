"""What brings Spotjax onto machines that others run: manifests and scripts, as text. Starts nothing itself."""
