# SPDX-License-Identifier: Apache-2.0
"""What the tests need beside the package: real guests, and a program that attacks from inside a jail."""
