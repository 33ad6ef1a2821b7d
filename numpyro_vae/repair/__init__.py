"""Better draws for the rows whose posterior cannot be trusted."""
