"""Pictures of a fit, a posterior and its checks."""
