# SPDX-License-Identifier: Apache-2.0
"""Which command lines only ask a QEMU what it can do: libvirt's, and none with a guest or anything of the host."""

from __future__ import annotations

import shlex

import pytest

from depriv.errors import ConfigError
from depriv.qemu.capabilities import asks_what_it_can_do

LIBVIRT = (
    "-S -no-user-config -nodefaults -nographic -machine none,accel=kvm:tcg"
    " -qmp unix:/var/lib/libvirt/qemu/qmp-A/qmp.monitor,server=on,wait=off"
    " -pidfile /var/lib/libvirt/qemu/qmp-A/qmp.pid -daemonize"
)


@pytest.mark.parametrize("line", [LIBVIRT, LIBVIRT.replace("kvm:tcg", "tcg"), "-M none", "-machine type=none -S"])
def test_question_is_known(line: str) -> None:
    assert asks_what_it_can_do(tuple(shlex.split(line)))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "-S -nodefaults",
        "-machine pc",
        f"{LIBVIRT} -machine pc",
        f"-machine pc {LIBVIRT}",
        "-machine none,kernel=/boot/vmlinuz",
        "-machine none,dumpdtb=x",
        "-machine none,memory-backend=m",
        "-machine accel=tcg",
        f"{LIBVIRT} -m 64",
        f"{LIBVIRT} -drive file=x.qcow2,format=qcow2",
        f"{LIBVIRT} x.img",
        f"{LIBVIRT} -blockdev driver=file,filename=x,node-name=x",
        f"{LIBVIRT} -incoming tcp:127.0.0.1:4444",
        f"{LIBVIRT} -device loader,file=x",
        f"{LIBVIRT} -netdev user,id=n",
        f"{LIBVIRT} -chardev socket,id=c,host=127.0.0.1,port=1,server=on",
        f"{LIBVIRT} -monitor tcp:127.0.0.1:1,server",
        f"{LIBVIRT} -qmp tcp:127.0.0.1:4444,server=on",
        f"{LIBVIRT} -vnc :0",
        f"{LIBVIRT} -readconfig x",
    ],
)
def test_what_has_a_guest_or_something_of_the_host_is_no_question(line: str) -> None:
    assert not asks_what_it_can_do(tuple(shlex.split(line)))


def test_word_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such option"):
        asks_what_it_can_do(("-machine", "none", "-machin", "none"))
