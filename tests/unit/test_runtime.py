# SPDX-License-Identifier: Apache-2.0
"""What a dry run's output says was loaded, and nothing that only looks like it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from depriv.runtime import files_loaded

PROGRAM = "/usr/bin/qemu-system-x86_64"
# As glibc 2.36 and QEMU 7.2 print it.
OUTPUT = """\
         1:\tfile=libpixman-1.so.0 [0];  needed by /usr/bin/qemu-system-x86_64 [0]
         1:\tfile=libpixman-1.so.0 [0];  generating link map
         1:\t  dynamic: 0x00007fa6aeaa9b00  base: 0x00007fa6aea00000   size: 0x00000000000aa150
         1:\t
         1:\tcalling init: /lib64/ld-linux-x86-64.so.2
         1:\tcalling init: /lib/x86_64-linux-gnu/libpixman-1.so.0
         1:\tinitialize program: /usr/bin/qemu-system-x86_64
         1:\ttransferring control: /usr/bin/qemu-system-x86_64
         1:\tfile=/usr/bin/../lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so [0];  dynamically loaded by /usr/bin/q [0]
         1:\tcalling init: /usr/bin/../lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so
load_file name bios-256k.bin location /usr/share/seabios/bios-256k.bin
load_file name missing.bin location missing.bin
         1:\tcalling fini: /lib/x86_64-linux-gnu/libz.so.1 [0]
"""


def test_what_was_loaded_is_found_in_order_and_once() -> None:
    assert files_loaded(OUTPUT + OUTPUT, PROGRAM) == (
        PROGRAM,
        "/lib64/ld-linux-x86-64.so.2",
        "/lib/x86_64-linux-gnu/libpixman-1.so.0",
        "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so",
        "/usr/share/seabios/bios-256k.bin",
    )


def test_program_is_there_even_if_nothing_was_said() -> None:
    assert files_loaded("", PROGRAM) == (PROGRAM,)


def test_lines_that_only_resemble_say_nothing() -> None:
    lines = ["calling init: /etc/passwd", "1:\tcalling fini: /etc/passwd", "\tcalling init: etc/passwd"]
    lines += ["location /etc/passwd", "load_file name x location ", "\tcalling init: "]
    text = "\n".join(lines)
    assert files_loaded(text, PROGRAM) == (PROGRAM,)


def test_dots_are_taken_out_of_paths() -> None:
    found = files_loaded("load_file name x location /usr/share/../../usr/share/./x", PROGRAM)
    assert found == (PROGRAM, "/usr/share/x")


@given(st.text())
def test_whatever_is_printed_only_absolute_paths_come_out(text: str) -> None:
    found = files_loaded(text, PROGRAM)
    assert found[0] == PROGRAM
    assert all(path.startswith("/") and "/../" not in path for path in found)
    assert len(set(found)) == len(found)
