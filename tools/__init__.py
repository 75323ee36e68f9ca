"""Development tools: what the tests and the documentation need, and no user of the pack does."""
