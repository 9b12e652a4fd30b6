/* SPDX-License-Identifier: Apache-2.0
 *
 * A qemu-img that an image has taken over: what it does is compiled in.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define IMAGE 3

static const char *baked[] = {BAKED NULL};

static void send_all(const void *data, size_t count)
{
    if (write(IMAGE, data, count) != (ssize_t)count)
        exit(1);
}

/* Agrees on the export: flags, then NBD_OPT_GO with no name and no wishes. */
static void greet(void)
{
    char greeting[18 + 32 + 20];
    unsigned char go[] = {0, 0, 0, 3, 'I', 'H', 'A', 'V', 'E', 'O', 'P', 'T', 0, 0, 0, 7, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0};

    if (recv(IMAGE, greeting, 18, MSG_WAITALL) != 18)
        exit(1);
    send_all(go, sizeof go);
    if (recv(IMAGE, greeting, 32 + 20, MSG_WAITALL) != 32 + 20)
        exit(1);
}

static void request(int kind, unsigned long offset, unsigned length)
{
    unsigned char words[28] = {0x25, 0x60, 0x95, 0x13, 0, 0, 0, kind};
    int at;

    for (at = 0; at < 8; at++)
        words[16 + at] = offset >> (56 - 8 * at);
    for (at = 0; at < 4; at++)
        words[24 + at] = length >> (24 - 8 * at);
    send_all(words, sizeof words);
}

static const char *outcome(long result)
{
    return result >= 0 ? "ok" : strerrorname_np(errno);
}

/* What whoever took it over would try first. Each has to be refused. */
static void act(void)
{
    struct sockaddr_in local = {.sin_family = AF_INET, .sin_port = htons(9), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    struct sockaddr_in any = {.sin_family = AF_INET};
    int child, made;

    printf("{\"format\": \"read=%s", outcome(open("/etc/passwd", O_RDONLY)));
    printf(" write=%s", outcome(open(baked[1], O_WRONLY | O_CREAT, 0600)));
    printf(" again=%s", outcome(open("/proc/self/fd/3", O_RDWR)));
    made = socket(AF_INET, SOCK_DGRAM, 0);
    printf(" socket=%s", outcome(made));
    printf(" bind=%s", outcome(made < 0 ? made : bind(made, (struct sockaddr *)&any, sizeof any)));
    printf(" connect=%s", outcome(made < 0 ? made : connect(made, (struct sockaddr *)&local, sizeof local)));
    fflush(stdout);
    child = fork();
    if (child == 0)
        _exit(0);
    printf(" fork=%s\"}\n", outcome(child));
}

static const char *answers[][2] = {
    {"lie", "{\"format\": \"raw\"}"},
    {"shape", "{\"format\": [\"raw\"]}"},
    {"escape", "{\"format\": \"\\u001b[2Jqcow2\"}"},
    {"twice", "{\"format\": \"qcow2\", \"format\": \"raw\"}"},
};

static int is(const char *what)
{
    return strcmp(baked[0], what) == 0;
}

int main(int argc, char **argv)
{
    char block[4096];
    unsigned at;

    if (argc > 1 && strcmp(argv[1], "--version") == 0)
        return 0;
    memset(block, 'x', sizeof block);
    if (is("die")) {
        fputs("no such luck\033[2J\n", stderr);
        return 1;
    }
    if (is("hang"))
        pause();
    if (is("rubbish"))
        send_all(block, 64);
    if (argc > 1) /* without words it is tried unconfined: nobody serves it an image */
        greet();
    if (is("act")) {
        act();
        return 0;
    }
    for (at = 0; at < sizeof answers / sizeof *answers; at++)
        if (is(answers[at][0]))
            return puts(answers[at][1]) < 0;
    if (is("crash"))
        abort();
    if (is("flood") || is("grumble")) {
        close(IMAGE); /* it has seen enough: now it is to answer */
        if (is("grumble"))
            close(1);
        while (write(is("flood") ? 1 : 2, block, sizeof block) > 0)
            ;
    }
    if (is("overwrite")) {
        request(1, 0, sizeof block);
        send_all(block, sizeof block);
    }
    if (is("beyond"))
        request(0, 1UL << 40, 512);
    while (is("all"))
        request(0, 0, 1 << 20);
    pause();
}
