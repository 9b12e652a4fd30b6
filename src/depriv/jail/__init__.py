# SPDX-License-Identifier: Apache-2.0
"""The only privileged code: executed, never imported."""
