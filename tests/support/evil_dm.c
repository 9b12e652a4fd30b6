/* SPDX-License-Identifier: Apache-2.0
 *
 * A device model that lies: it says over QMP that it is ready, and keeps what it was to give up. With EVIL_PRIVCMD in its
 * name, an unrestricted privcmd; with EVIL_XENBUS, a way to xenstore; with EVIL_NOTHING, nothing: the positive control.
 * It is started as QEMU is, and speaks on the listening socket that is descriptor 3.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void say(int client, const char *text)
{
    if (write(client, text, strlen(text)) < 0)
        _exit(1);
}

int main(int argc, char **argv)
{
    char line[4096], answer[4096], id[200];

    for (int at = 1; at < argc; at++)
        if (strcmp(argv[at], "help") == 0)
            return 0; /* -L help: it has no folders */
    if (strstr(argv[0], "PRIVCMD") && open("/dev/xen/privcmd", O_RDWR) < 0)
        perror("privcmd");
    if (strstr(argv[0], "XENBUS") && open("/dev/xen/xenbus", O_RDWR) < 0)
        perror("xenbus");
    for (;;) {
        int client = accept(3, 0, 0);
        if (client < 0)
            return 1;
        say(client, "{\"QMP\": {\"version\": {\"qemu\": {\"major\": 7, \"minor\": 2, \"micro\": 0}, \"package\": \"\"},"
                    " \"capabilities\": []}}\r\n");
        size_t have = 0;
        for (ssize_t got; (got = read(client, line + have, sizeof line - 1 - have)) > 0;) {
            have += got;
            line[have] = 0;
            if (!strchr(line, '\n'))
                continue;
            char *from = strstr(line, "\"id\""), *quote = from ? strchr(from + 4, '"') : 0;
            char *end = quote ? strchr(quote + 1, '"') : 0;
            id[0] = 0;
            if (end)
                snprintf(id, sizeof id, "%.*s", (int)(end - quote + 1), quote);
            const char *result = strstr(line, "query-status")
                                     ? "{\"status\": \"prelaunch\", \"running\": false, \"singlestep\": false}"
                                     : "{}";
            snprintf(answer, sizeof answer, "{\"return\": %s, \"id\": %s}\r\n", result, id[0] ? id : "null");
            say(client, answer);
            have = 0;
        }
        close(client);
    }
}
