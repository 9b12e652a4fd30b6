# SPDX-License-Identifier: Apache-2.0
"""The demonstration guest: a disk image whose boot sector shows that the guest runs and reaches its disk. Pure.

It needs no download and no operating system, says something within a tenth of a second even under emulation, and
goes on for ever: enough to show a confined start, a disk passed by descriptor, a save and a migration. On the first
serial port it prints ::

    depriv demonstration guest: hello from inside
    disk says: <the text in sector 1>
    disk write ok
    ..........                                       <- a dot per BIOS timer tick, 18.2 a second
    ..........

and it counts its boots in sector 2 (``MARKER``, then a 32-bit little-endian number), which the host can read back.

It works with SeaBIOS, that is on the machines pc and q35, from an IDE, AHCI, virtio-blk or virtio-scsi disk. It does
not work on microvm: qboot offers neither int 13h nor a timer tick. One restart of the guest adds one to the count.

Sources: Ralf Brown's Interrupt List, int 13h AH=42h and AH=43h (extended read and write), memory 0040:006C (timer
ticks); boot sector at 0000:7C00 with the drive in DL; 8250 UART registers at 3F8h, the first serial port of a PC.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

SECTOR_BYTES: Final = 512
HELLO: Final = "depriv demonstration guest: hello from inside"
SAYS: Final = "disk says: "
READ_FAILED: Final = "disk read failed"
WRITE_OK: Final = "disk write ok"
WRITE_FAILED: Final = "disk write failed"
MARKER: Final = b"depriv was here "  # 16 bytes; the count of boots follows
MARKER_OFFSET: Final = 2 * SECTOR_BYTES

# Where the BIOS puts the boot sector, and where the guest reads its sectors to.
ORIGIN: Final = 0x7C00
BUFFER: Final = 0x8000

# (label, machine code, assembly). In the machine code >label is a distance of one byte and >>label one of two, both
# from the end of the operand; =label is an address of two bytes. tests/unit/test_demo_guest.py assembles the right
# column with the GNU assembler and compares, so neither column can drift from the other.
CODE: Final[tuple[tuple[str, str, str], ...]] = (
    # A known machine: flat segments, the stack below the boot sector, the boot drive kept.
    ("start", "31 c0", "xor ax, ax"),
    ("", "8e d8", "mov ds, ax"),
    ("", "8e c0", "mov es, ax"),
    ("", "8e d0", "mov ss, ax"),
    ("", "bc 00 7c", "mov sp, 0x7c00"),
    ("", "fc", "cld"),
    ("", "88 16 =drive", "mov byte ptr ds:[drive], dl"),
    # The serial port: pairs of register (low byte) and value, up to a zero register.
    ("", "be =uart", "mov si, offset uart"),
    ("", "b6 03", "mov dh, 3"),
    ("setup", "ad", "lodsw"),
    ("", "84 c0", "test al, al"),
    ("", "74 >hi", "jz hi"),
    ("", "88 c2", "mov dl, al"),
    ("", "88 e0", "mov al, ah"),
    ("", "ee", "out dx, al"),
    ("", "eb >setup", "jmp setup"),
    ("hi", "fb", "sti"),
    ("", "be =hello", "mov si, offset hello"),
    ("", "e8 >>puts", "call puts"),
    # Sector 1: the text from outside. The byte behind the sector ends a text that fills it.
    ("", "b0 01", "mov al, 1"),
    ("", "b4 42", "mov ah, 0x42"),
    ("", "e8 >>disk", "call disk"),
    ("", "be =noread", "mov si, offset noread"),
    ("", "72 >show", "jc show"),
    ("", "be =says", "mov si, offset says"),
    ("", "e8 >>puts", "call puts"),
    ("", "c6 06 00 82 00", "mov byte ptr ds:[0x8200], 0"),
    ("", "be 00 80", "mov si, 0x8000"),
    ("", "e8 >>puts", "call puts"),
    ("", "be =crlf", "mov si, offset crlf"),
    ("show", "e8 >>puts", "call puts"),
    # Sector 2: read it, stamp it, add one to the count, write it back.
    ("", "b0 02", "mov al, 2"),
    ("", "b4 42", "mov ah, 0x42"),
    ("", "e8 >>disk", "call disk"),
    ("", "72 >verdict", "jc verdict"),
    ("", "be =marker", "mov si, offset marker"),
    ("", "bf 00 80", "mov di, 0x8000"),
    ("", "b9 08 00", "mov cx, 8"),
    ("", "f3 a5", "rep movsw"),
    ("", "66 ff 05", "inc dword ptr [di]"),
    ("", "b0 02", "mov al, 2"),
    ("", "b4 43", "mov ah, 0x43"),
    ("", "e8 >>disk", "call disk"),
    ("verdict", "be =nowrite", "mov si, offset nowrite"),
    ("", "72 >report", "jc report"),
    ("", "be =wrote", "mov si, offset wrote"),
    ("report", "e8 >>puts", "call puts"),
    # For ever: a dot whenever the BIOS's tick count has changed, ten to a line.
    ("row", "b9 0a 00", "mov cx, 10"),
    ("wait", "f4", "hlt"),
    ("", "a1 6c 04", "mov ax, word ptr ds:[0x46c]"),
    ("", "39 e8", "cmp ax, bp"),
    ("", "74 >wait", "jz wait"),
    ("", "89 c5", "mov bp, ax"),
    ("", "b0 2e", "mov al, 0x2e"),
    ("", "e8 >>putc", "call putc"),
    ("", "e2 >wait", "loop wait"),
    ("", "be =crlf", "mov si, offset crlf"),
    ("", "e8 >>puts", "call puts"),
    ("", "eb >row", "jmp row"),
    # disk: int 13h function AH on sector AL and the buffer; carry: it failed. The count is set anew each time, since
    # the BIOS leaves there how many sectors it moved.
    ("disk", "be =packet", "mov si, offset packet"),
    ("", "88 44 08", "mov byte ptr [si + 8], al"),
    ("", "c6 44 02 01", "mov byte ptr [si + 2], 1"),
    ("", "8a 16 =drive", "mov dl, byte ptr ds:[drive]"),
    ("", "b0 00", "mov al, 0"),
    ("", "cd 13", "int 0x13"),
    ("", "c3", "ret"),
    # puts: the text at SI, up to its zero byte.
    ("puts", "ac", "lodsb"),
    ("", "84 c0", "test al, al"),
    ("", "74 >done", "jz done"),
    ("", "e8 >>putc", "call putc"),
    ("", "eb >puts", "jmp puts"),
    ("done", "c3", "ret"),
    # putc: AL, once the transmitter is empty. Without a serial port the status reads ff: never waits.
    ("putc", "88 c4", "mov ah, al"),
    ("", "ba fd 03", "mov dx, 0x3fd"),
    ("full", "ec", "in al, dx"),
    ("", "a8 20", "test al, 0x20"),
    ("", "74 >full", "jz full"),
    ("", "ba f8 03", "mov dx, 0x3f8"),
    ("", "88 e0", "mov al, ah"),
    ("", "ee", "out dx, al"),
    ("", "c3", "ret"),
)

DATA: Final[tuple[tuple[str, bytes], ...]] = (
    # LCR: divisor latch; divisor 1 = 115200 baud; LCR: 8N1; FCR: FIFOs on and clear; MCR: DTR and RTS; end.
    ("uart", bytes((0xFB, 0x80, 0xF8, 0x01, 0xF9, 0x00, 0xFB, 0x03, 0xFA, 0x07, 0xFC, 0x03, 0x00, 0x00))),
    # Disk address packet: 16 bytes long, sectors, buffer offset and segment, first sector (64 bits).
    ("packet", bytes((16, 0, 1, 0)) + BUFFER.to_bytes(2, "little") + bytes(2) + bytes(8)),
    ("hello", f"{HELLO}\r\n\0".encode()),
    ("says", f"{SAYS}\0".encode()),
    ("noread", f"{READ_FAILED}\r\n\0".encode()),
    ("wrote", f"{WRITE_OK}\r\n\0".encode()),
    ("nowrite", f"{WRITE_FAILED}\r\n\0".encode()),
    ("crlf", b"\r\n\0"),
    ("marker", MARKER),
    ("drive", b"\0"),
)


def image(*, text: str = "hello from the host", size_mib: int = 1) -> bytes:
    """Return a raw disk image of ``size_mib`` MiB that boots the demonstration guest.

    Args:
        text: What the guest finds on its disk and prints; printable ASCII, at most 512 characters.
        size_mib: Size of the image in MiB, at least 1.

    Raises:
        ValueError: the text does not fit or is not printable ASCII, or the size is not positive.
    """
    if not (text.isascii() and text.isprintable()) or len(text) > SECTOR_BYTES:
        raise ValueError(f"the guest's text must be at most {SECTOR_BYTES} printable ASCII characters: {text[:40]!r}")
    if size_mib < 1:
        raise ValueError(f"an image of {size_mib} MiB has no room for the guest")
    return (boot_sector() + text.encode()).ljust(size_mib << 20, b"\0")


def boots(disk: bytes) -> int:
    """Return how often the guest has booted from this disk and could write to it: the count in sector 2.

    Only the first three sectors are looked at. A disk without the marker was never written to: 0.
    """
    sector = disk[MARKER_OFFSET : MARKER_OFFSET + SECTOR_BYTES]
    if not sector.startswith(MARKER):
        return 0
    return int.from_bytes(sector[len(MARKER) : len(MARKER) + 4], "little")


def boot_sector() -> bytes:
    """Return the 512 bytes: code, data, and the signature the BIOS looks for."""
    where = addresses()
    sector = b"".join(encode(code, where, place) for place, code in placed())
    sector += b"".join(data for _label, data in DATA)
    return sector.ljust(SECTOR_BYTES - 2, b"\0") + b"\x55\xaa"


def addresses() -> dict[str, int]:
    """Return the address of each label, in code and data."""
    where = {label: place for (label, _code, _asm), (place, _) in zip(CODE, placed(), strict=True) if label}
    place = ORIGIN + sum(length(code) for _label, code, _asm in CODE)
    for label, data in DATA:
        where[label] = place
        place += len(data)
    return where


def placed() -> tuple[tuple[int, str], ...]:
    """Return address and machine code of each row of ``CODE``."""
    rows: list[tuple[int, str]] = []
    place = ORIGIN
    for _label, code, _asm in CODE:
        rows.append((place, code))
        place += length(code)
    return tuple(rows)


def length(code: str) -> int:
    """Return how many bytes a row of machine code becomes."""
    return sum(2 if word.startswith(("=", ">>")) else 1 for word in code.split())


def encode(code: str, where: dict[str, int], place: int) -> bytes:
    """Return the bytes of a row that starts at ``place``; ``where`` has the address of each label.

    Raises:
        KeyError: the row names a label that is not there.
        OverflowError: a jump of one byte goes too far.
    """
    result = b""
    for word in code.split():
        if word.startswith("="):
            result += where[word[1:]].to_bytes(2, "little")
        elif word.startswith(">>"):
            result += (where[word[2:]] - place - len(result) - 2).to_bytes(2, "little", signed=True)
        elif word.startswith(">"):
            result += (where[word[1:]] - place - len(result) - 1).to_bytes(1, "little", signed=True)
        else:
            result += bytes.fromhex(word)
    return result
