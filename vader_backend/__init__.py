"""Reward-gradient alignment of video diffusion models: a library that knows nothing of ComfyUI."""
