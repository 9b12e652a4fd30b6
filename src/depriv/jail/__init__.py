# SPDX-License-Identifier: Apache-2.0
"""The only privileged code. Executed, never imported; standard library only."""
