# SPDX-License-Identifier: Apache-2.0
"""QEMU's language: its command line. Pure."""
