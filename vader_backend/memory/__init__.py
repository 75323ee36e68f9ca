"""Memory tricks: context managers on a model that never change the result."""
