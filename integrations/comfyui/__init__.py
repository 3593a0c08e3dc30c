"""Noise schedules fitted to a model, inside ComfyUI: nodes to fit, load, save and inspect them."""

import logging

from . import fastsched_fitted, fastsched_schedule

#: The older nodes need nothing but ComfyUI, and workflows name them.
NODE_CLASS_MAPPINGS = {**fastsched_schedule.NODE_CLASS_MAPPINGS, **fastsched_fitted.NODE_CLASS_MAPPINGS}
NODE_DISPLAY_NAME_MAPPINGS = {
    name: shown.replace(" (fastsched)", " (fastsched, old)")
    for name, shown in {
        **fastsched_schedule.NODE_DISPLAY_NAME_MAPPINGS,
        **fastsched_fitted.NODE_DISPLAY_NAME_MAPPINGS,
    }.items()
}

try:
    from . import nodes
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "fastsched":
        raise
    logging.warning("fastsched's nodes need the Python package fastsched, which is not installed (docs/comfyui.md)")
else:
    NODE_CLASS_MAPPINGS |= nodes.NODE_CLASS_MAPPINGS
    NODE_DISPLAY_NAME_MAPPINGS |= nodes.NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
