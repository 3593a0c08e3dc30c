"""Nodes that only the check uses: conditions without a text encoder, outputs as JSON, and a patch to be refused."""

import json
import os

import torch


class CheckConditioning:
    """Random tokens and a pooled condition."""

    CATEGORY, FUNCTION, RETURN_TYPES = "checking", "make", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        """The node's inputs."""
        return {"required": {"seed": ("INT", {}), "width": ("INT", {"max": 9999}), "pooled": ("INT", {"max": 9999})}}

    def make(self, seed, width, pooled):
        """The conditions, as `networks.conditions` makes them."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(1, 7, width, generator=generator)
        return ([[tokens, {"pooled_output": torch.randn(1, pooled, generator=generator)}]],)


class CheckDump:
    """SIGMAS, a text and a number as the node's output."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "checking", "dump", (), True

    @classmethod
    def INPUT_TYPES(cls):
        """The node's inputs."""
        return {
            "required": {"text": ("STRING", {"forceInput": True})},
            "optional": {"sigmas": ("SIGMAS",), "number": ("INT", {"forceInput": True})},
        }

    def dump(self, text, sigmas=None, number=None):
        """The inputs as JSON."""
        values = None if sigmas is None else [float(value) for value in sigmas]
        said = {"text": text, "sigmas": values, "number": number, "process": os.getpid()}
        return {"ui": {"said": [json.dumps(said)]}}


class CheckForgetful:
    """A patch with a state: every second call of the model gets another answer."""

    CATEGORY, FUNCTION, RETURN_TYPES = "checking", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        """The node's inputs."""
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        """The patched model."""
        patched, calls = model.clone(), [0]

        def after(given):
            calls[0] += 1
            return given["denoised"] * (1.5 if calls[0] % 2 else 1.0)

        patched.set_model_sampler_post_cfg_function(after)
        return (patched,)


NODE_CLASS_MAPPINGS = {
    "CheckConditioning": CheckConditioning,
    "CheckDump": CheckDump,
    "CheckForgetful": CheckForgetful,
}
