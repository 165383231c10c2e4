"""Built-in attacks, one plugin a file."""
