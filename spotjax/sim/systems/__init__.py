"""Systems under test: what each of them does when instances come and go."""
