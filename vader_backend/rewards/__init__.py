"""Reward models, one file per reward."""
