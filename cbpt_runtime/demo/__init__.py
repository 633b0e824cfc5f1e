"""The built-in demo: draw pictures, train a backdoored CLIP, prove it, purify it, measure again."""

from cbpt_runtime.demo.story import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
