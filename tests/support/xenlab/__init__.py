# SPDX-License-Identifier: Apache-2.0
"""A real Xen host (hypervisor, dom0, xl) for the tests, in QEMU's software emulation: no KVM, no second machine.

``image`` builds it from Debian's packages, ``machine`` boots it once, saves it and resumes it in about a second,
``dom0`` runs commands in it; what runs inside it is in ``inside``. By hand::

    python -m tests.support.xenlab start trixie --name mine
    python -m tests.support.xenlab run mine -- xl info
    python -m tests.support.xenlab end mine
"""
