"""Built-in architectures, one plugin a file."""
