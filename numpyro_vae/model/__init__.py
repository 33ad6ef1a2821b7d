"""What is read from, or scored by, a NumPyro model."""
