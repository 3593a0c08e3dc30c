"""Parts of `check.py`, which checks the nodes in a real ComfyUI. The nodes do not use them."""
