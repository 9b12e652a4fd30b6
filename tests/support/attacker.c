// SPDX-License-Identifier: Apache-2.0
// Stands where QEMU stands and tries what whoever took it over would try. Built by build.py, static, libc only.
//
//   attacker [--victim PID] [--path FILE] [--socket PATH] [--abstract NAME] [--fd N] [--listener N] [--only ACT...]
//   attacker --list | --serve | --threads | --bomb COUNT
//
// Prints one line for each act on descriptor 1: its name, a tab, and "ok" (the kernel let it) or the name of the errno.
// The name is written before the act: if the act ends the process, the line ends behind the tab. Where fork works,
// acts that change or may end the process run in a child, and a child that is killed shows as e.g. "SIGSYS".
// Where fork fails they run in this process, after all others. With --only the named acts run in this process,
// in the order given: one process for each act is the exact way where fork itself ends the process.
//
// An act does nothing that outlasts it. Where only an impossible argument is harmless, the errno that the kernel
// returns after it has checked the privilege counts as "ok" (man pages; the order of checks read in Linux 6.1).
// No act sends a signal (they send the null signal 0), none broadcasts, none talks to anything but this host.
//
// Other arguments are ignored, so that it can be started with QEMU's. Arguments compiled in (BAKED) come first.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/capability.h>
#include <linux/perf_event.h>
#include <linux/sched.h>
#include <linux/vm_sockets.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/fsuid.h>
#include <sys/inotify.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#ifndef BAKED
#define BAKED
#endif

extern char **environ;

static pid_t victim;           // --victim: a process of somebody else
static const char *path;       // --path: a file of somebody else
static const char *socket_at;  // --socket: a socket that listens
static const char *abstract;   // --abstract: the same, without its leading zero
static int granted = -1;       // --fd: a descriptor the jail was given, open for writing
static int listener = -1;      // --listener: a TCP socket the jail was given, bound to IPv4 and listening

// --- small parts ----------------------------------------------------------------------------------------------------

// Success of an act that made a descriptor; the descriptor goes away.
static int opened(long fd)
{
	if (fd < 0)
		return -1;
	close((int)fd);
	return 0;
}

static int can_open(const char *name, int flags)
{
	return opened(open(name, flags | O_CLOEXEC));
}

// Success also where the kernel, all privileges checked, found fault with the (impossible) argument.
static int beyond(long result, int fault)
{
	return result < 0 && errno != fault ? -1 : 0;
}

static int fail(int error)
{
	errno = error;
	return -1;
}

static int can_socket(int family, int type, int protocol)
{
	return opened(socket(family, type | SOCK_CLOEXEC, protocol));
}

static socklen_t unix_name(struct sockaddr_un *to, const char *name, int is_abstract)
{
	memset(to, 0, sizeof *to);
	to->sun_family = AF_UNIX;
	strncpy(to->sun_path + is_abstract, name, sizeof to->sun_path - 2);
	return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + is_abstract + strlen(name));
}

static int unix_try(int (*how)(int, const struct sockaddr *, socklen_t), const char *name, int is_abstract)
{
	struct sockaddr_un to;
	socklen_t length = unix_name(&to, name, is_abstract);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	int result = how(fd, (struct sockaddr *)&to, length), error = errno;
	close(fd);
	errno = error;
	return result;
}

static int reap(long pid)
{
	if (pid < 0)
		return -1;
	if (pid == 0)
		_exit(0);
	return waitpid((pid_t)pid, NULL, __WALL) < 0 ? -1 : 0;
}

static int created(const char *name)
{
	if (opened(open(name, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600)))
		return -1;
	return unlink(name);
}

static int raise_limit(int resource, rlim_t to)
{
	struct rlimit limit = {to, to};
	return setrlimit(resource, &limit);
}

static int sleeper(void *unused)
{
	(void)unused;
	syscall(SYS_exit, 0);
	return 0;
}

static void *idle(void *unused)
{
	for (;;)
		pause();
	return unused;
}

static void *end(void *unused)
{
	return unused;
}

// --- files ----------------------------------------------------------------------------------------------------------

static int read_passwd(void) { return can_open("/etc/passwd", O_RDONLY); }
static int read_shadow(void) { return can_open("/etc/shadow", O_RDONLY); }
static int read_dotdot(void) { return can_open("../../../../../../../../etc/passwd", O_RDONLY); }
static int read_usr(void) { return can_open("/usr/lib", O_RDONLY | O_DIRECTORY); }
static int read_sh(void) { return can_open("/bin/sh", O_RDONLY); }
static int read_home(void) { return can_open("/root", O_RDONLY | O_DIRECTORY); }
static int read_run(void) { return can_open("/run", O_RDONLY | O_DIRECTORY); }
static int read_boot(void) { return can_open("/boot", O_RDONLY | O_DIRECTORY); }
static int path_read(void) { return can_open(path, O_RDONLY); }
static int path_write(void) { return can_open(path, O_WRONLY); }
static int path_stat(void) { struct stat s; return stat(path, &s); }

static int list_root(void)
{
	char names[4096];
	int fd = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	long size = syscall(SYS_getdents64, fd, names, sizeof names);
	int error = errno;
	close(fd);
	errno = error;
	return size < 0 ? -1 : size > 48 ? 0 : fail(ENOENT);  // "." and "..": 24 bytes each
}

static int write_root(void) { return created("/depriv-attack"); }
static int write_tmp(void) { return created("/tmp/depriv-attack"); }
static int write_shm(void) { return created("/dev/shm/depriv-attack"); }
static int write_dev(void) { return created("/dev/depriv-attack"); }
static int write_usr(void) { return created("/usr/depriv-attack"); }
static int write_cwd(void) { return created("depriv-attack"); }
static int write_passwd(void) { return can_open("/etc/passwd", O_WRONLY); }
static int tmpfile_root(void) { return opened(open("/", O_TMPFILE | O_WRONLY | O_CLOEXEC, 0600)); }
static int mkdir_root(void) { return mkdir("/depriv-attack", 0700) ? -1 : rmdir("/depriv-attack"); }
static int symlink_root(void) { return symlink("x", "/depriv-attack") ? -1 : unlink("/depriv-attack"); }
static int mkfifo_root(void) { return mkfifo("/depriv-attack", 0600) ? -1 : unlink("/depriv-attack"); }
static int chown_root(void) { return chown("/", getuid(), (gid_t)-1); }

static int chmod_root(void)
{
	struct stat s;
	return stat("/", &s) ? -1 : chmod("/", s.st_mode & 07777);
}

static int mknod_null(void)
{
	return mknod("/depriv-attack", S_IFCHR | 0600, 0x103) ? -1 : unlink("/depriv-attack");
}

static int handle_open(void)
{
	struct { struct file_handle head; unsigned char bytes[128]; } handle = {.head.handle_bytes = 128};
	int id, fd;
	if (name_to_handle_at(AT_FDCWD, "/", &handle.head, &id, 0)) {
		handle.head.handle_bytes = 8;
		handle.head.handle_type = 1;
	}
	fd = open_by_handle_at(AT_FDCWD, &handle.head, O_RDONLY | O_CLOEXEC);
	return fd < 0 ? beyond(-1, ESTALE) : opened(fd);
}

static int handle_name(void)
{
	struct { struct file_handle head; unsigned char bytes[128]; } handle = {.head.handle_bytes = 128};
	int id;
	return beyond(name_to_handle_at(AT_FDCWD, "/", &handle.head, &id, 0), EOPNOTSUPP);
}

static int watch_inotify(void) { return opened(inotify_init1(IN_CLOEXEC)); }
static int watch_fanotify(void) { return opened(fanotify_init(FAN_CLOEXEC, O_RDONLY)); }
static int memfd(void) { return opened(memfd_create("x", MFD_CLOEXEC)); }

static int memfd_big(void)
{
	int fd = memfd_create("x", MFD_CLOEXEC);
	if (fd < 0)
		return -1;
	int result = ftruncate(fd, (off_t)1 << 40), error = errno;
	close(fd);
	errno = error;
	return result;
}

static int dev_mem(void) { return can_open("/dev/mem", O_RDONLY); }
static int dev_kmsg(void) { return can_open("/dev/kmsg", O_RDONLY); }
static int dev_kvm(void) { return can_open("/dev/kvm", O_RDWR); }
static int dev_tun(void) { return can_open("/dev/net/tun", O_RDWR); }
static int dev_vhost(void) { return can_open("/dev/vhost-net", O_RDWR); }
static int dev_loop(void) { return can_open("/dev/loop-control", O_RDWR); }
static int dev_fuse(void) { return can_open("/dev/fuse", O_RDWR); }
static int dev_ptmx(void) { return can_open("/dev/ptmx", O_RDWR | O_NOCTTY); }
static int dev_tty(void) { return can_open("/dev/tty", O_RDWR | O_NOCTTY); }
static int dev_privcmd(void) { return can_open("/dev/xen/privcmd", O_RDWR); }
static int dev_evtchn(void) { return can_open("/dev/xen/evtchn", O_RDWR); }

// --- /proc and /sys -------------------------------------------------------------------------------------------------

static int victim_file(const char *name, int flags)
{
	char full[64];
	snprintf(full, sizeof full, "/proc/%d/%s", (int)victim, name);
	return can_open(full, flags);
}

static int proc_list(void) { return can_open("/proc/self/status", O_RDONLY); }
static int proc_mounts(void) { return can_open("/proc/self/mountinfo", O_RDONLY); }
static int proc_self_mem(void) { return can_open("/proc/self/mem", O_RDWR); }
static int proc_self_exe(void) { return can_open("/proc/self/exe", O_RDONLY); }
static int proc_oom(void) { return can_open("/proc/self/oom_score_adj", O_WRONLY); }
static int proc_1_root(void) { return can_open("/proc/1/root/etc/passwd", O_RDONLY); }
static int proc_sysrq(void) { return can_open("/proc/sysrq-trigger", O_WRONLY); }
static int proc_kcore(void) { return can_open("/proc/kcore", O_RDONLY); }
static int proc_keys(void) { return can_open("/proc/keys", O_RDONLY); }
static int proc_core_pattern(void) { return can_open("/proc/sys/kernel/core_pattern", O_WRONLY); }
static int proc_victim_mem(void) { return victim_file("mem", O_RDWR); }
static int proc_victim_root(void) { return victim_file("root", O_RDONLY | O_DIRECTORY); }
static int proc_victim_environ(void) { return victim_file("environ", O_RDONLY); }
static int sys_read(void) { return can_open("/sys/kernel", O_RDONLY | O_DIRECTORY); }
static int sys_cgroup(void) { return can_open("/sys/fs/cgroup", O_RDONLY | O_DIRECTORY); }

// --- what was inherited ---------------------------------------------------------------------------------------------

static int environment(void)
{
	for (char **item = environ; *item; item++)
		if (strncmp(*item, "PATH=", 5))
			return 0;
	return fail(ENOENT);
}

static int extra_fds(void)
{
	for (int fd = 3; fd < 65536; fd++)
		if (fd != granted && fcntl(fd, F_GETFD) >= 0)
			return 0;
	return fail(EBADF);
}

static int terminal(void) { return ioctl(0, TCGETS, &(struct termios){0}); }
static int tiocsti(void) { return beyond(ioctl(0, TIOCSTI, NULL), EFAULT); }
static int tioclinux(void) { return beyond(ioctl(0, TIOCLINUX, NULL), EFAULT); }

static int fd_grow(void)
{
	struct stat s;
	if (fstat(granted, &s) || pwrite(granted, "", 1, s.st_size + ((off_t)1 << 40)) != 1)
		return -1;
	return ftruncate(granted, s.st_size);
}

static int fd_truncate(void)
{
	struct stat s;
	if (fstat(granted, &s) || ftruncate(granted, s.st_size + ((off_t)1 << 40)))
		return -1;
	return ftruncate(granted, s.st_size);
}

static int fd_chmod(void)
{
	struct stat s;
	return fstat(granted, &s) ? -1 : fchmod(granted, s.st_mode & 07777);
}

static int fd_chown(void)
{
	struct stat s;
	if (fstat(granted, &s) || fchown(granted, s.st_uid + 1, s.st_gid))
		return -1;
	return fchown(granted, s.st_uid, s.st_gid);
}

static int fd_reopen(void)
{
	char name[64];
	snprintf(name, sizeof name, "/proc/self/fd/%d", granted);
	return can_open(name, O_RDWR);
}

static int fd_link(void) { return linkat(granted, "", AT_FDCWD, "/depriv-attack", AT_EMPTY_PATH) ? -1 : unlink("/depriv-attack"); }

// --- sockets --------------------------------------------------------------------------------------------------------

static int socket_inet(void) { return can_socket(AF_INET, SOCK_STREAM, 0); }
static int socket_inet6(void) { return can_socket(AF_INET6, SOCK_STREAM, 0); }
static int socket_udp(void) { return can_socket(AF_INET, SOCK_DGRAM, 0); }
static int socket_raw(void) { return can_socket(AF_INET, SOCK_RAW, IPPROTO_ICMP); }
static int socket_ping(void) { return can_socket(AF_INET, SOCK_DGRAM, IPPROTO_ICMP); }
static int socket_unix(void) { return can_socket(AF_UNIX, SOCK_STREAM, 0); }
static int socket_netlink(void) { return can_socket(AF_NETLINK, SOCK_RAW, 0); }
static int socket_audit(void) { return can_socket(AF_NETLINK, SOCK_RAW, 9); }
static int socket_uevent(void) { return can_socket(AF_NETLINK, SOCK_RAW, 15); }
static int socket_packet(void) { return can_socket(AF_PACKET, SOCK_RAW, 0); }
static int socket_vsock(void) { return can_socket(AF_VSOCK, SOCK_STREAM, 0); }
static int socket_alg(void) { return can_socket(AF_ALG, SOCK_SEQPACKET, 0); }
static int socket_key(void) { return can_socket(AF_KEY, SOCK_RAW, 2); }
static int socket_xdp(void) { return can_socket(AF_XDP, SOCK_RAW, 0); }
static int socket_can(void) { return can_socket(AF_CAN, SOCK_RAW, 1); }
static int socket_bluetooth(void) { return can_socket(AF_BLUETOOTH, SOCK_RAW, 1); }
static int socket_tipc(void) { return can_socket(AF_TIPC, SOCK_RDM, 0); }

static int socket_pair(void)
{
	int pair[2];
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		return -1;
	close(pair[0]);
	return close(pair[1]);
}

static struct sockaddr_in loopback(in_port_t port)
{
	return (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static int inet_try(int (*how)(int, const struct sockaddr *, socklen_t), in_port_t port)
{
	struct sockaddr_in to = loopback(port);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	int result = how(fd, (struct sockaddr *)&to, sizeof to), error = errno;
	close(fd);
	errno = error;
	return result;
}

// Refused means that there was a network to be refused on.
static int connect_inet(void) { return beyond(inet_try(connect, 1), ECONNREFUSED); }
static int bind_inet(void) { return inet_try(bind, 0); }
static int connect_socket(void) { return unix_try(connect, socket_at, 0); }
static int connect_abstract(void) { return unix_try(connect, abstract, 1); }
static int bind_abstract(void) { return unix_try(bind, "depriv-attack", 1); }
static int bind_path(void) { return unix_try(bind, "/depriv-attack", 0) ? -1 : unlink("/depriv-attack"); }

// A socket that listens, made to connect instead. Refused: it was on its way. Each leaves it so that the next can try.

static int listener_connect(void)
{
	struct sockaddr_in to = loopback(1);
	if (connect(listener, &(struct sockaddr){.sa_family = AF_UNSPEC}, sizeof to))
		return -1;
	return beyond(connect(listener, (struct sockaddr *)&to, sizeof to), ECONNREFUSED);
}

static int listener_fast_open(long call)
{
	struct sockaddr_in to = loopback(1);
	struct iovec data = {"x", 1};
	struct mmsghdr one = {.msg_hdr = {.msg_name = &to, .msg_namelen = sizeof to, .msg_iov = &data, .msg_iovlen = 1}};
	shutdown(listener, SHUT_RD);  // it listens no more; ENOTCONN: it did not
	if (call == SYS_sendto)
		return beyond(sendto(listener, "x", 1, MSG_FASTOPEN, (struct sockaddr *)&to, sizeof to), ECONNREFUSED);
	if (call == SYS_sendmsg)
		return beyond(sendmsg(listener, &one.msg_hdr, MSG_FASTOPEN), ECONNREFUSED);
	return beyond(sendmmsg(listener, &one, 1, MSG_FASTOPEN), ECONNREFUSED);
}

static int listener_sendto(void) { return listener_fast_open(SYS_sendto); }
static int listener_sendmsg(void) { return listener_fast_open(SYS_sendmsg); }
static int listener_sendmmsg(void) { return listener_fast_open(SYS_sendmmsg); }

// --- other processes ------------------------------------------------------------------------------------------------

static int pidfd_of(pid_t pid) { return (int)syscall(SYS_pidfd_open, pid, 0); }

static int see_any(void)
{
	int error = ESRCH;
	for (pid_t pid = 1; pid < 4096; pid++) {
		if (pid == getpid() || pid == getppid())
			continue;
		if (kill(pid, 0) == 0)
			return 0;
		if (errno != ESRCH)
			error = errno;
	}
	return fail(error);
}

static int see_parent(void) { return getppid() ? kill(getppid(), 0) : fail(ESRCH); }
static int kill_victim(void) { return kill(victim, 0); }
static int ptrace_victim(void) { return (int)ptrace(PTRACE_SEIZE, victim, NULL, NULL); }
static int prlimit_victim(void) { struct rlimit l; return prlimit(victim, RLIMIT_NOFILE, NULL, &l); }
static int sched_victim(void) { return sched_setscheduler(victim, SCHED_OTHER, &(struct sched_param){0}); }
static int nice_victim(void) { return setpriority(PRIO_PROCESS, (id_t)victim, getpriority(PRIO_PROCESS, (id_t)victim)); }
static int kcmp_victim(void) { return syscall(SYS_kcmp, getpid(), victim, 1, 0, 0) < 0 ? -1 : 0; }
static int pidfd_victim(void) { return opened(pidfd_of(victim)); }

static int with_pidfd(pid_t pid, long call, long second, long third)
{
	int fd = pidfd_of(pid);
	if (fd < 0)
		return -1;
	long result = syscall(call, fd, second, third, 0);
	int error = errno;
	close(fd);
	errno = error;
	return result < 0 ? -1 : 0;
}

static int pidfd_getfd_victim(void) { return with_pidfd(victim, SYS_pidfd_getfd, 0, 0); }
static int pidfd_signal_victim(void) { return with_pidfd(victim, SYS_pidfd_send_signal, 0, 0); }
static int setns_victim(void) { return with_pidfd(victim, SYS_setns, CLONE_NEWUTS, 0); }
static int setns_self(void) { return with_pidfd(getpid(), SYS_setns, CLONE_NEWUTS, 0); }

static int vm_victim(int (*how)(const struct iovec *, const struct iovec *))
{
	char byte;
	struct iovec here = {&byte, 1}, there = {(void *)8, 1};  // never mapped
	return beyond(how(&here, &there), EFAULT);
}

static int readv_how(const struct iovec *a, const struct iovec *b) { return (int)process_vm_readv(victim, a, 1, b, 1, 0); }
static int writev_how(const struct iovec *a, const struct iovec *b) { return (int)process_vm_writev(victim, a, 1, b, 1, 0); }
static int vm_readv_victim(void) { return vm_victim(readv_how); }
static int vm_writev_victim(void) { return vm_victim(writev_how); }

// --- making processes and programs ----------------------------------------------------------------------------------

static int fork_one(void) { return reap(syscall(SYS_fork)); }
static int clone_one(void) { return reap(syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0)); }

static int vfork_one(void)
{
	pid_t pid = vfork();
	if (pid == 0)
		_exit(0);
	return pid < 0 || waitpid(pid, NULL, 0) < 0 ? -1 : 0;
}

static int clone3_one(void)
{
	struct clone_args how = {.exit_signal = SIGCHLD};
	return reap(syscall(SYS_clone3, &how, sizeof how));
}

static int clone_vm(void)
{
	static char stack[16384] __attribute__((aligned(16)));
	return reap(clone(sleeper, stack + sizeof stack, CLONE_VM | SIGCHLD, NULL));
}

static int clone_newuser(void) { return reap(syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0)); }
static int clone_newpid(void) { return reap(syscall(SYS_clone, CLONE_NEWPID | SIGCHLD, 0, 0, 0, 0)); }

static int thread(void)
{
	pthread_t made;
	int error = pthread_create(&made, NULL, end, NULL);
	if (error)
		return fail(error);
	pthread_join(made, NULL);
	return 0;
}

static char *const no_environment[] = {NULL};

// The program that takes this one's place finishes the line.
static int exec_sh(void)
{
	return execve("/bin/sh", (char *[]){"sh", "-c", "echo ok", NULL}, no_environment);
}

static int exec_memfd(void)
{
	int fd = memfd_create("x", MFD_CLOEXEC);
	if (fd < 0 || write(fd, "not a program", 13) != 13 || fchmod(fd, 0700))
		return -1;
	return beyond(syscall(SYS_execveat, fd, "", (char *[]){"x", NULL}, no_environment, AT_EMPTY_PATH), ENOEXEC);
}

static int session(void) { return setsid() < 0 && errno != EPERM ? -1 : 0; }

// --- identity and privilege -----------------------------------------------------------------------------------------

static int setuid_0(void) { return (int)syscall(SYS_setuid, 0); }
static int setresuid_0(void) { return (int)syscall(SYS_setresuid, 0, 0, 0); }
static int setgid_0(void) { return (int)syscall(SYS_setgid, 0); }
static int setgroups_0(void) { gid_t none = 0; return (int)syscall(SYS_setgroups, 1, &none); }
static int setuid_other(void) { return (int)syscall(SYS_setuid, geteuid() + 1); }
static int setfsuid_0(void) { return setfsuid(0), setfsuid(0) == 0 ? 0 : fail(EPERM); }
static int keep_caps(void) { return prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0); }
static int securebits(void) { return prctl(PR_SET_SECUREBITS, 0, 0, 0, 0); }
static int drop_bounding(void) { return prctl(PR_CAPBSET_DROP, CAP_WAKE_ALARM, 0, 0, 0); }

static int capset_admin(void)
{
	struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2] = {{1U << CAP_SYS_ADMIN, 1U << CAP_SYS_ADMIN, 0}, {0, 0, 0}};
	return (int)syscall(SYS_capset, &head, data);
}

static int dumpable(void) { return prctl(PR_SET_DUMPABLE, 1, 0, 0, 0); }

// --- namespaces and mounts ------------------------------------------------------------------------------------------

static int unshare_user(void) { return unshare(CLONE_NEWUSER); }
static int unshare_mount(void) { return unshare(CLONE_NEWNS); }
static int unshare_net(void) { return unshare(CLONE_NEWNET); }
static int unshare_pid(void) { return unshare(CLONE_NEWPID); }
static int chroot_root(void) { return chroot("/"); }
static int pivot(void) { long r = syscall(SYS_pivot_root, "/", "/"); return r && errno == EBUSY ? 0 : beyond(r, EINVAL); }
static int mount_none(void) { return beyond(mount("none", "/", "depriv-none", 0, NULL), ENODEV); }
static int mount_private(void) { return mount(NULL, "/", NULL, MS_PRIVATE, NULL); }

// Not without MNT_EXPIRE: a plain umount of the root is taken for a wish to remount it read-only (Linux
// fs/namespace.c, do_umount). With it the root is refused, after the privilege was checked.
static int umount_root(void) { return beyond(umount2("/", MNT_EXPIRE), EINVAL); }

static int fs_open(void) { return opened(syscall(SYS_fsopen, "tmpfs", 1)); }
static int open_tree_clone(void) { return opened(syscall(SYS_open_tree, AT_FDCWD, "/", 1 | O_CLOEXEC)); }
static int mount_move(void) { return beyond(syscall(SYS_move_mount, -1, "", -1, "", 0x44), EBADF); }

// --- the kernel's wide surface --------------------------------------------------------------------------------------

static int bpf_map(void)
{
	union bpf_attr attr = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1};
	return opened(syscall(SYS_bpf, BPF_MAP_CREATE, &attr, sizeof attr));
}

static int bpf_prog(void)
{
	struct bpf_insn code[] = {{.code = 0xb7}, {.code = 0x95}};  // r0 = 0; exit
	union bpf_attr attr = {.prog_type = BPF_PROG_TYPE_SOCKET_FILTER, .insn_cnt = 2, .insns = (uintptr_t)code,
		.license = (uintptr_t)"GPL"};
	return opened(syscall(SYS_bpf, BPF_PROG_LOAD, &attr, sizeof attr));
}

static int perf(pid_t pid, int cpu)
{
	struct perf_event_attr attr = {.type = PERF_TYPE_SOFTWARE, .size = sizeof attr, .exclude_kernel = 1,
		.config = PERF_COUNT_SW_CPU_CLOCK};
	return opened(syscall(SYS_perf_event_open, &attr, pid, cpu, -1, 0));
}

static int perf_self(void) { return perf(0, -1); }
static int perf_system(void) { return perf(-1, 0); }
static int io_uring(void) { char params[120] = {0}; return opened(syscall(SYS_io_uring_setup, 1, params)); }
static int userfault(void) { return opened(syscall(SYS_userfaultfd, O_CLOEXEC)); }
static int userfault_user(void) { return opened(syscall(SYS_userfaultfd, O_CLOEXEC | 1)); }
static int key_session(void) { return syscall(SYS_keyctl, 0, -3, 1) < 0 ? -1 : 0; }
static int key_add(void) { return syscall(SYS_add_key, "user", "depriv-attack", "x", 1, -2) < 0 ? -1 : 0; }
static int key_request(void) { return beyond(syscall(SYS_request_key, "user", "depriv-none", NULL, 0), ENOKEY); }

static int mq(void)
{
	mqd_t made = mq_open("/depriv-attack", O_CREAT | O_RDWR, 0600, NULL);
	return made < 0 || mq_close(made) ? -1 : mq_unlink("/depriv-attack");
}

static int shm(void) { int id = shmget(IPC_PRIVATE, 4096, 0600); return id < 0 ? -1 : shmctl(id, IPC_RMID, NULL); }
static int sem(void) { int id = semget(IPC_PRIVATE, 1, 0600); return id < 0 ? -1 : semctl(id, 0, IPC_RMID); }
static int msg(void) { int id = msgget(IPC_PRIVATE, 0600); return id < 0 ? -1 : msgctl(id, IPC_RMID, NULL); }
static int secret_memory(void) { return opened(syscall(SYS_memfd_secret, O_CLOEXEC)); }
static int load_module(void) { return beyond(syscall(SYS_init_module, NULL, 0, ""), ENOEXEC); }
static int load_module_fd(void) { return beyond(syscall(SYS_finit_module, -1, "", 0), EBADF); }
static int unload_module(void) { return beyond(syscall(SYS_delete_module, "depriv_none", O_NONBLOCK), ENOENT); }
static int kexec(void) { return beyond(syscall(SYS_kexec_load, 0, 99, NULL, 0xffff0001UL), EINVAL); }
static int reboot_wrong(void) { return beyond(syscall(SYS_reboot, 1, 2, 3, NULL), EINVAL); }
static int kernel_log(void) { char line[64]; return syscall(SYS_syslog, 3, line, sizeof line) < 0 ? -1 : 0; }
static int swap_on(void) { return beyond(syscall(SYS_swapon, "/depriv-none", 0), ENOENT); }
static int accounting(void) { return beyond(syscall(SYS_acct, "/depriv-none"), ENOENT); }
static int host_name(void) { return beyond(syscall(SYS_sethostname, "x", -1), EINVAL); }
static int quota(void) { return beyond(syscall(SYS_quotactl, 0x80000100, NULL, 0, NULL), EINVAL); }  // Q_SYNC of all
static int io_port(void) { return (int)syscall(SYS_iopl, 3); }
static int io_perm(void) { return (int)syscall(SYS_ioperm, 0x80, 1, 1); }
static int ldt(void) { char entry[16] = {0}; return syscall(SYS_modify_ldt, 1, entry, sizeof entry) < 0 ? -1 : 0; }
static int persona(void) { return personality(ADDR_NO_RANDOMIZE) < 0 ? -1 : 0; }

static int x32_getpid(void) { return syscall(0x40000000 | SYS_getpid) < 0 ? -1 : 0; }

static int int80_getpid(void)
{
	long result;
	__asm__ volatile("int $0x80" : "=a"(result) : "0"(20L) : "memory", "r8", "r9", "r10", "r11");
	return result < 0 ? fail((int)-result) : 0;
}

// --- taking more than one's share -----------------------------------------------------------------------------------

static int raise_files(void)
{
	struct rlimit now;
	return getrlimit(RLIMIT_NOFILE, &now) ? -1 : raise_limit(RLIMIT_NOFILE, now.rlim_max + 1);
}

static int raise_fsize(void) { return raise_limit(RLIMIT_FSIZE, RLIM_INFINITY); }
static int raise_core(void) { return raise_limit(RLIMIT_CORE, (rlim_t)1 << 30); }
static int raise_tasks(void) { return raise_limit(RLIMIT_NPROC, (rlim_t)1 << 16); }
static int lock_memory(void) { static char page[1 << 20]; return mlock(page, sizeof page); }
static int nice_up(void) { return setpriority(PRIO_PROCESS, 0, -20); }
static int realtime(void) { return sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){1}); }
static int affinity(void) { cpu_set_t s; CPU_ZERO(&s); CPU_SET(0, &s); return sched_setaffinity(0, sizeof s, &s); }
static int io_priority(void) { return syscall(SYS_ioprio_set, 1, 0, 1 << 13) < 0 ? -1 : 0; }

static int mapped(size_t size, int protection)
{
	void *at = mmap(NULL, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return at == MAP_FAILED ? -1 : munmap(at, size);
}

static int map_exec(void) { return mapped(4096, PROT_READ | PROT_WRITE | PROT_EXEC); }
static int map_big(void) { return mapped((size_t)1 << 40, PROT_READ | PROT_WRITE); }

static int many_fds(void)
{
	int made[2000], count = 0, error = 0;
	for (; count < 2000 && !error; count++)
		if ((made[count] = dup(1)) < 0) {
			error = errno;
			break;
		}
	while (count--)
		close(made[count]);
	return error ? fail(error) : 0;
}

// --- the catalogue --------------------------------------------------------------------------------------------------

enum { PLAIN, CHANGES };  // CHANGES: this process, or whether it lives

struct act {
	const char *name;
	int (*run)(void);
	int kind;
};

#define A(name) {#name, name, PLAIN}
#define C(name) {#name, name, CHANGES}

static const struct act acts[] = {
	A(read_passwd), A(read_shadow), A(read_dotdot), A(read_usr), A(read_sh), A(read_home), A(read_run), A(read_boot),
	A(list_root), A(path_read), A(path_write), A(path_stat), A(write_root), A(write_tmp), A(write_shm), A(write_dev),
	A(write_usr), A(write_cwd), A(write_passwd), A(tmpfile_root), A(mkdir_root), A(symlink_root), A(mkfifo_root),
	A(chmod_root), A(chown_root), A(mknod_null), A(handle_name), A(handle_open), A(watch_inotify), A(watch_fanotify),
	A(memfd), A(memfd_big), A(dev_mem), A(dev_kmsg), A(dev_kvm), A(dev_tun), A(dev_vhost), A(dev_loop), A(dev_fuse),
	A(dev_ptmx), A(dev_tty), A(dev_privcmd), A(dev_evtchn),
	A(proc_list), A(proc_mounts), A(proc_self_mem), A(proc_self_exe), A(proc_oom), A(proc_1_root), A(proc_sysrq),
	A(proc_kcore), A(proc_keys), A(proc_core_pattern), A(proc_victim_mem), A(proc_victim_root), A(proc_victim_environ),
	A(sys_read), A(sys_cgroup),
	A(environment), A(extra_fds), A(terminal), A(tiocsti), A(tioclinux), A(fd_grow), A(fd_truncate), A(fd_chmod),
	A(fd_chown), A(fd_reopen), A(fd_link),
	A(socket_inet), A(socket_inet6), A(socket_udp), A(socket_raw), A(socket_ping), A(socket_unix), A(socket_netlink),
	A(socket_audit), A(socket_uevent), A(socket_packet), A(socket_vsock), A(socket_alg), A(socket_key), A(socket_xdp),
	A(socket_can), A(socket_bluetooth), A(socket_tipc), A(socket_pair), A(connect_inet), A(bind_inet),
	A(connect_socket), A(connect_abstract), A(bind_abstract), A(bind_path),
	A(listener_connect), A(listener_sendto), A(listener_sendmsg), A(listener_sendmmsg),
	A(see_any), A(see_parent), A(kill_victim), A(prlimit_victim), A(sched_victim), A(nice_victim), A(kcmp_victim),
	A(pidfd_victim), A(pidfd_getfd_victim), A(pidfd_signal_victim), A(vm_readv_victim), A(vm_writev_victim),
	A(bpf_map), A(bpf_prog), A(perf_self), A(perf_system), A(io_uring), A(userfault), A(userfault_user),
	A(mq), A(shm), A(sem), A(msg), A(secret_memory), A(load_module), A(load_module_fd), A(unload_module),
	A(host_name), A(map_exec), A(map_big), A(many_fds), A(lock_memory), A(thread), A(dumpable),
	// From here on in a child, where there can be one. The first says whether there can.
	C(fork_one), C(vfork_one), C(clone_one), C(clone3_one), C(clone_vm), C(clone_newuser), C(clone_newpid),
	C(key_session), C(key_add), C(key_request), C(raise_files), C(raise_fsize), C(raise_core), C(raise_tasks),
	C(nice_up), C(realtime), C(affinity), C(io_priority), C(persona), C(ldt), C(io_perm), C(io_port), C(session),
	C(keep_caps), C(securebits), C(drop_bounding), C(quota), C(swap_on), C(accounting), C(kexec), C(reboot_wrong),
	C(kernel_log), C(ptrace_victim), C(x32_getpid), C(chroot_root), C(pivot), C(mount_none),
	C(mount_private), C(umount_root), C(fs_open), C(open_tree_clone), C(mount_move), C(setns_self), C(setns_victim),
	C(setfsuid_0), C(capset_admin), C(setgroups_0), C(setgid_0), C(setuid_0), C(setresuid_0), C(unshare_net),
	C(unshare_pid), C(unshare_mount), C(exec_memfd), C(setuid_other), C(unshare_user), C(exec_sh),
	C(int80_getpid),  // which may end a process that cannot fork
};

#define COUNT (sizeof acts / sizeof *acts)

static void say(const char *text)
{
	if (write(1, text, strlen(text)) < 0)
		_exit(3);
}

static void say_result(int result)
{
	const char *name = result ? strerrorname_np(errno) : "ok";
	say(name ? name : "errno?");
	say("\n");
}

// Acts on what was not given on the command line are left out.
static int possible(const char *name)
{
	return !((strstr(name, "victim") && !victim) || (!strncmp(name, "path_", 5) && !path) ||
		(!strcmp(name, "connect_socket") && !socket_at) || (!strcmp(name, "connect_abstract") && !abstract) ||
		(!strncmp(name, "fd_", 3) && granted < 0) || (!strncmp(name, "listener_", 9) && listener < 0));
}

static int attempt(const struct act *act)
{
	say(act->name);
	say("\t");
	errno = 0;
	int result = act->run();
	say_result(result);
	return result;
}

static void attempt_in_child(const struct act *act)
{
	int status;
	pid_t pid = fork();
	if (pid == 0) {
		attempt(act);
		_exit(0);
	}
	if (pid < 0 || waitpid(pid, &status, 0) < 0)
		_exit(4);
	if (WIFSIGNALED(status)) {
		say("SIG");
		say(sigabbrev_np(WTERMSIG(status)));
		say("\n");
	}
}

static void attempt_all(void)
{
	int can_fork = 0;
	for (size_t n = 0; n < COUNT; n++) {
		const struct act *act = &acts[n];
		if (!possible(act->name))
			continue;
		if (act->run == fork_one)
			can_fork = attempt(act) == 0;
		else if (act->kind == CHANGES && can_fork)
			attempt_in_child(act);
		else
			attempt(act);
	}
}

static int attempt_named(const char *name)
{
	for (size_t n = 0; n < COUNT; n++)
		if (!strcmp(acts[n].name, name) && possible(name)) {
			attempt(&acts[n]);
			return 0;
		}
	return -1;
}

// COUNT processes at the most, each in a session of its own; then wait for the end.
static void bomb(long count)
{
	char line[64];
	long made = 0;
	pid_t pid = 1;
	while (made < count && (pid = fork()) > 0)
		made++;
	if (pid == 0) {
		setsid();
		idle(NULL);
	}
	snprintf(line, sizeof line, "bomb\t%ld\t%s\n", made, pid < 0 ? strerrorname_np(errno) : "ok");
	say(line);
	idle(NULL);
}

// The main thread ends, another one lives on: the process is a zombie that still works.
static void headless(void)
{
	pthread_t made;
	int error = pthread_create(&made, NULL, idle, NULL);
	say("headless\t");
	say_result(error ? fail(error) : 0);
	if (!error)
		syscall(SYS_exit, 0);
	_exit(5);
}

int main(int argc, char **argv)
{
	static char *baked[] = {BAKED NULL};
	char *words[256];
	int count = 0, n;
	for (n = 0; baked[n] && count < 255; n++)
		words[count++] = baked[n];
	for (n = 1; n < argc && count < 255; n++)
		words[count++] = argv[n];
	words[count] = NULL;
	for (n = 0; n < count; n++) {
		const char *word = words[n], *value = words[n + 1];
		if (!strcmp(word, "--serve"))
			idle(NULL);
		else if (!strcmp(word, "--threads"))
			headless();
		else if (!strcmp(word, "--list")) {
			for (size_t a = 0; a < COUNT; a++)
				say(acts[a].name), say("\n");
			return 0;
		} else if (!strcmp(word, "--only")) {
			int unknown = 0;
			while (++n < count)
				unknown |= attempt_named(words[n]);
			return unknown ? 2 : 0;
		} else if (value && !strcmp(word, "--bomb"))
			bomb(atol(value));
		else if (value && !strcmp(word, "--victim"))
			victim = atoi(value);
		else if (value && !strcmp(word, "--path"))
			path = value;
		else if (value && !strcmp(word, "--socket"))
			socket_at = value;
		else if (value && !strcmp(word, "--abstract"))
			abstract = value;
		else if (value && !strcmp(word, "--fd"))
			granted = atoi(value);
		else if (value && !strcmp(word, "--listener"))
			listener = atoi(value);
	}
	attempt_all();
	return 0;
}
