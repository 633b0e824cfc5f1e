"""A page for people beside Triton: drop an image, see labels, probabilities and the alarm.

`UiServer` serves it on the loopback and forwards four paths of one model to Triton, nothing else. It adds
what Triton's own port lacks for a browser: a size limit, a strict content security policy, and refusal of
requests that are not the page's own.
"""

from cbpt_runtime.serving.page.server import UiServer

__all__ = ["UiServer"]
