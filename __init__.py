"""VADER Video Alignment: reward-gradient alignment of video diffusion models, as ComfyUI nodes and as a library."""

if __package__:  # pytest imports a root __init__.py bare; relative imports would fail there
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    WEB_DIRECTORY = "./nodes/web"
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
