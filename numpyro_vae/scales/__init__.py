"""From a network's raw output to a scale."""
