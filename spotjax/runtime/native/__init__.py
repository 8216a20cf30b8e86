"""Code for the CPU that is compiled on the machine where it runs."""
