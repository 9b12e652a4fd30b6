// SPDX-License-Identifier: Apache-2.0
// Processes that will not go, for the reaper to end. Built by build.py, static, libc only.
//
//   bombs static COUNT    COUNT processes that wait
//   bombs fork COUNT      every process forks for ever; at most COUNT of them at once (RLIMIT_NPROC)
//   bombs chain COUNT     COUNT chains: each process forks and ends, its child goes on
//   bombs daemon COUNT    COUNT times forked twice, in a session of its own, the parents gone
//   bombs vfork COUNT     every process starts itself again by vfork and exec, for ever; at most COUNT at once
//   bombs threads COUNT   COUNT threads, each of which ends and starts the next; the first thread is gone
//   bombs stopped COUNT   COUNT processes that stop themselves, whenever they are continued
//   bombs deaf COUNT      COUNT processes that ignore and block every signal, and spin
//   bombs groups COUNT    COUNT processes, each in a process group and a session of its own
//   bombs strike FROM     kills every process with a number above FROM, as fast as it can
//   bombs starve COUNT    COUNT processes that keep the first processor busy, and one that pins everything to it that it
//                         may, as SCHED_IDLE
//
// Refuses to be of a system's uid. Only for a pid namespace of its own. Ends by itself after a minute.

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SECONDS = 60 };

static time_t end;

static time_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec;
}

static void go_on(void)
{
	if (now() >= end)
		_exit(0);
}

static void rest(void)
{
	while (1) {
		go_on();
		sleep(1);
	}
}

// Children of ours are nobody's to collect: a zombie would take a number for nothing.
static void limit(rlim_t count)
{
	struct rlimit both = { count, count };
	if (setrlimit(RLIMIT_NPROC, &both))
		_exit(3);
	signal(SIGCHLD, SIG_IGN);
}

static void each(long count, void (*body)(void))
{
	for (long n = 0; n < count; n++) {
		pid_t pid = fork();
		if (pid < 0)
			_exit(4);
		if (!pid) {
			body();
			_exit(0);
		}
	}
}

static void fork_for_ever(void)
{
	while (1) {
		go_on();
		fork();
		setsid();
	}
}

static void chain(void)
{
	while (1) {
		go_on();
		pid_t pid = fork();
		if (pid > 0)
			_exit(0);
	}
}

static void vanish(void)
{
	setsid();
	if (fork())
		_exit(0);
	rest();
}

static void vfork_for_ever(char *count)
{
	char left[24];
	snprintf(left, sizeof left, "%ld", (long)end);
	setenv("BOMBS_END", left, 1);
	while (1) {
		go_on();
		if (vfork() == 0) {
			execl("/proc/self/exe", "bombs", "vfork", count, NULL);
			_exit(1);
		}
	}
}

static void *next_thread(void *unused)
{
	pthread_t next;
	go_on();
	usleep(200);
	while (pthread_create(&next, NULL, next_thread, unused))
		usleep(100);
	pthread_detach(next);
	return NULL;
}

static void stop_again(void)
{
	while (1) {
		go_on();
		raise(SIGSTOP);
	}
}

static void deaf(void)
{
	sigset_t all;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	for (int n = 1; n < NSIG; n++)
		signal(n, SIG_IGN);
	while (1)
		go_on();
}

static void apart(void)
{
	setsid();
	pid_t pid = fork();
	if (!pid)
		setpgid(0, 0);
	rest();
}

static void strike(long from)
{
	while (1) {
		go_on();
		for (pid_t pid = from + 1; pid < from + 200; pid++)
			kill(pid, SIGKILL);
	}
}

static void pin(pid_t pid, int processor)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(processor, &set);
	sched_setaffinity(pid, sizeof set, &set);
}

static void spin(void)
{
	pin(0, 0);
	while (1)
		go_on();
}

static void starve(void)
{
	struct sched_param none = { 0 };
	pid_t mine = getpid();
	pin(0, sysconf(_SC_NPROCESSORS_ONLN) - 1);
	while (1) {
		go_on();
		for (pid_t pid = mine + 1; pid < mine + 200; pid++) {
			pin(pid, 0);
			sched_setscheduler(pid, SCHED_IDLE, &none);
		}
	}
}

int main(int argc, char **argv)
{
	if (argc < 3 || getuid() < 1000 || geteuid() < 1000)
		return 2;
	const char *what = argv[1], *left = getenv("BOMBS_END");
	long count = atol(argv[2]);
	end = left ? atol(left) : now() + SECONDS;
	signal(SIGCHLD, SIG_IGN);
	if (!strcmp(what, "static")) {
		each(count - 1, rest);
	} else if (!strcmp(what, "fork")) {
		limit(count);
		fork_for_ever();
	} else if (!strcmp(what, "chain")) {
		each(count, chain);
		return 0;
	} else if (!strcmp(what, "daemon")) {
		each(count, vanish);
		return 0;
	} else if (!strcmp(what, "vfork")) {
		limit(count);
		vfork_for_ever(argv[2]);
	} else if (!strcmp(what, "threads")) {
		pthread_t thread;
		while (count-- > 0)
			if (pthread_create(&thread, NULL, next_thread, NULL))
				return 4;
		pthread_exit(NULL);
	} else if (!strcmp(what, "stopped")) {
		each(count, stop_again);
		return 0;
	} else if (!strcmp(what, "deaf")) {
		each(count, deaf);
		return 0;
	} else if (!strcmp(what, "groups")) {
		each(count, apart);
		return 0;
	} else if (!strcmp(what, "strike")) {
		strike(count);
	} else if (!strcmp(what, "starve")) {
		each(count, spin);
		starve();
	} else {
		return 2;
	}
	rest();
}
