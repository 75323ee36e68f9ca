"""How the mini networks are trained; `python -m vader_nodes.vader_backend.mini.recipe` runs all of it."""
