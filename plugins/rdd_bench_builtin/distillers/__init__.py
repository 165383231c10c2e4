"""Built-in distillers, one plugin a file."""
