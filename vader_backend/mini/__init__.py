"""The embedded world: a renderer, a pixel oracle, small trained networks and the recipe that trains them."""
