"""Compares our loaders and forward passes with tensors that the original implementations computed."""
