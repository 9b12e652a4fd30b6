// SPDX-License-Identifier: Apache-2.0
// An HVM guest in one sector. Every second it prints on the first serial port
//     tick 0001 cd=ISO-ONE  write=ok
// The count shows that a restored guest goes on where it was; the label is the CD's in the first drive ("none" without
// one); "write" tells whether the guest could write sector WRITE of its disk just now ("ok" or "failed"), or is "off"
// if WRITE is 0. Sources: Ralf Brown's Interrupt List, int 13h AH=42h and AH=43h; ECMA-119, 8.4 (the volume's label);
// 8250 UART. SeaBIOS gives the first hard disk the number 80h and the first CD E0h.
.code16
.intel_syntax noprefix
        xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     sp, 0x7c00
        cld
        sti
again:
        mov     si, offset tick
        call    puts
        inc     word ptr ds:[count]
        mov     bx, ds:[count]
        mov     cx, 4
digit:                                  // four hexadecimal digits, the highest first
        rol     bx, 4
        mov     al, bl
        and     al, 15
        add     al, '0'
        cmp     al, '9'
        jbe     show
        add     al, 'a' - '9' - 1
show:
        call    putc
        loop    digit

        mov     si, offset cd
        call    puts
        mov     eax, 16                 // the primary volume descriptor
        mov     dx, 0x42e0
        call    disk
        mov     si, 0x8028              // the first eight characters of the label
        mov     byte ptr ds:[0x8030], 0
        jnc     label
        // A changed CD leaves a unit attention pending, which SeaBIOS never clears: reset the second IDE channel.
        mov     dx, 0x376
        mov     al, 14
        out     dx, al
        mov     al, 10
        out     dx, al
        mov     si, offset none
label:
        call    puts

        mov     si, offset write
        call    puts
        mov     si, offset off
        mov     eax, WRITE
        test    eax, eax
        jz      wrote
        mov     dx, 0x4380
        call    disk
        mov     si, offset ok
        jnc     wrote
        mov     si, offset failed
wrote:
        call    puts
        mov     cx, 18                  // timer ticks, 18.2 of them a second
sleep:
        hlt
        loop    sleep
        jmp     again

// Do DH (a function of int 13h) on drive DL with sector EAX and the buffer at 8000h; carry tells a failure.
disk:
        mov     ds:[sector], eax
        mov     word ptr ds:[sectors], 1 // the BIOS leaves 0 there after an error
        mov     ah, dh
        mov     al, 0
        mov     si, offset packet
        int     0x13
        ret

// Print the text at SI, up to a zero byte.
puts:
        lodsb
        test    al, al
        jz      return
        call    putc
        jmp     puts
putc:
        mov     ah, al
        mov     dx, 0x3fd
busy:
        in      al, dx
        test    al, 0x20
        jz      busy
        mov     dx, 0x3f8
        mov     al, ah
        out     dx, al
return:
        ret

tick:   .asciz  "tick "
cd:     .asciz  " cd="
none:   .asciz  "none"
write:  .asciz  " write="
off:    .asciz  "off\r\n"
ok:     .asciz  "ok\r\n"
failed: .asciz  "failed\r\n"
count:  .word   0
packet: .byte   16, 0
sectors: .word  1
        .word   0x8000, 0
sector: .long   0, 0
        .org    510
        .word   0xaa55
