"""What is made of a found solver."""
