"""Amortized guides: networks that return a posterior for each datum."""
