# SPDX-License-Identifier: Apache-2.0
"""Accuracy through the running service.

`corpus` (texts) -> `cases` (prompts with answers) -> `engine` (prefill and continuation in torch)
-> `methods`, `service`, `presses` (which tokens are read) -> `metrics` (numbers of them).
"""
