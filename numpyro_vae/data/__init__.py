"""Data as users hand them over, as the arguments of a model."""
