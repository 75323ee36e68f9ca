"""Scores, tables and pictures that compare a base model with an aligned one."""
