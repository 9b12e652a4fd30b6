# SPDX-License-Identifier: Apache-2.0
"""``depriv-dm``: libxl's device model, confined. What device_model_override names in an xl.cfg with dm_restrict=1.

libxl executes it twice: as a probe of QEMU's options, which is answered here without any QEMU, and for the domain.
Then it stays as the process that libxl has recorded, while QEMU runs below it in its own pid namespace. libxl speaks
to QEMU only once every restriction is proven: until then its connection waits. See docs/adr/0014.
"""

from __future__ import annotations

import os
import resource
import sys

from depriv.xenprobe import answer_probe, program, refuse


def main() -> None:
    """Be the program."""
    words = tuple(sys.argv[1:])
    try:
        status = run(words)
    except KeyboardInterrupt:
        status = 130
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(words: tuple[str, ...]) -> int:
    """Answer the probe or run the device model; return the exit status."""
    if "-xen-domid" not in words:
        return answer_probe(words)
    from depriv.errors import DeprivError, HostError, render  # noqa: PLC0415 (the probe does without)

    try:
        from depriv.xendm import DeviceModel  # noqa: PLC0415 (as above)

        # libxl's 256 KiB (libxl_linux.c, libxl__local_dm_preexec_restrict) are for QEMU, which gets its own limits.
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return DeviceModel(words).run(program())
    except DeprivError as error:
        failed: DeprivError = error
    except OSError as error:
        failed = HostError("the host refused", cause=str(error))
    text = render(failed)
    print(text, file=sys.stderr, flush=True)
    refuse(words, text)
    return failed.exit_status


if __name__ == "__main__":
    main()
