"""Parts of `check.py`: what checks the nodes in a real ComfyUI. No part of the nodes."""
