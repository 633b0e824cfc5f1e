"""The built-in demo: draw pictures, train a backdoored CLIP, prove it, purify it, measure again, serve it."""

from cbpt_runtime.demo.story import DemoResult, ServedDemo, run_demo, serve_demo

__all__ = ["DemoResult", "ServedDemo", "run_demo", "serve_demo"]
