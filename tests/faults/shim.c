/* Preloaded: counts the calls that write below a folder; at the Nth it kills the process, or the calls fail from there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum { COUNT = 0, KILL = -1, TEAR = -2 }; /* anything above is an errno */

static char below[4096];
static long at, seen;
static int how;
static long clock_after = -1, clock_step;

void shim_arm(const char *folder, long nth, int what) {
    strncpy(below, folder, sizeof below - 1);
    at = nth, seen = 0, how = what;
}
long shim_seen(void) { return seen; }
void shim_clock(long calls, long seconds) { clock_after = calls, clock_step = seconds; }

static void die(void) { kill(getpid(), SIGKILL); }

/* Whether the call must fail; with TEAR a write is told by *half to do half of its work first. */
static int struck(const char *path, int *half) {
    if (!below[0] || strncmp(path, below, strlen(below)) != 0) return 0;
    ++seen;
    if (how == COUNT || seen < at) return 0;
    if (how == KILL || (how == TEAR && !half)) die();
    if (how == TEAR) { *half = 1; return 0; }
    errno = how;
    return 1;
}
static int struck_fd(int fd, int *half) {
    char name[64], path[4096];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(name, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return struck(path, half);
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    int half = 0;
    if (struck_fd(fd, &half)) return -1;
    if (half) { real(fd, data, size / 2); die(); }
    return real(fd, data, size);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(pwrite64);
    int half = 0;
    if (struck_fd(fd, &half)) return -1;
    if (half) { real(fd, data, size / 2, offset); die(); }
    return real(fd, data, size, offset);
}
int fsync(int fd) { REAL(fsync); return struck_fd(fd, 0) ? -1 : real(fd); }
int fdatasync(int fd) { REAL(fdatasync); return struck_fd(fd, 0) ? -1 : real(fd); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); return struck_fd(fd, 0) ? -1 : real(fd, size); }
int rename(const char *from, const char *to) { REAL(rename); return struck(to, 0) ? -1 : real(from, to); }
/* Room can always be made: unlinking never fails, but a kill may come before it. */
int unlink(const char *path) { REAL(unlink); if (how < 0) struck(path, 0); return real(path); }

int clock_gettime(clockid_t id, struct timespec *now) {
    REAL(clock_gettime);
    int code = real(id, now);
    if (id == CLOCK_REALTIME && clock_after >= 0 && clock_after-- <= 0) clock_after = 0, now->tv_sec += clock_step;
    return code;
}
