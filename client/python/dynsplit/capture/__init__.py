# SPDX-License-Identifier: Apache-2.0
"""Records real key-value caches: `python -m dynsplit.capture --help`.

One direction only: `sources` (pinned model and texts) -> `tokenizer` -> `llama` (forward pass)
-> `container` (the file). `recorder` joins them and `__main__` is the command line.
"""


class CaptureError(Exception):
    """A capture cannot be made; the message is one sentence meant for the user."""
