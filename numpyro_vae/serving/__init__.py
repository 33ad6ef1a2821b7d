"""A trained posterior as compiled programs, which are run without this library."""
