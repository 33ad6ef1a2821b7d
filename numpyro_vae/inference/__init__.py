"""A trained guide, for any number of rows."""
