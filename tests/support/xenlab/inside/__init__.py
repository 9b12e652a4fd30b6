# SPDX-License-Identifier: Apache-2.0
"""What goes into dom0 and runs there, with dom0's own Python and nothing beside its standard library."""
