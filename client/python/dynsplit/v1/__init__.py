# SPDX-License-Identifier: Apache-2.0
"""Wire messages and stubs of package dynsplit.v1, generated (see generate_stubs.py)."""
