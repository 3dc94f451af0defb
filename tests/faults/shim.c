/* A preloaded library that counts the calls that change files below one directory, and at one of them kills the
 * process or makes the call fail.
 *
 *   FAULT_DIR    the directory, an absolute path without symlinks (or a prefix of names: /tmp/x/.out matches both
 *                /tmp/x/.out and /tmp/x/.out.lock)
 *   FAULT_AT     the number of the call, from 1; 0 only counts
 *   FAULT_HOW    kill: SIGKILL before the call; torn: half of a write, then SIGKILL; term or int: that signal before
 *                the call, which goes on; or an errno: the call fails
 *   FAULT_STAYS  1: the calls after that one fail too
 *   FAULT_LOG    descriptor that gets one line per counted call
 *
 * A process that has it loaded already (and its forked children) calls fault_arm instead. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FULL = 2 * PATH_MAX + 2 };
enum { KILL = -1, TORN = -2, TERM = -3, INTERRUPT = -4 };

static char prefix[PATH_MAX];
static long fault_at;
static int fault_how, fault_stays, fault_log = -1;
static atomic_long calls;

void fault_arm(const char* dir, long at, int how, int stays, int log) {
    snprintf(prefix, sizeof prefix, "%s", dir);
    fault_at = at, fault_how = how, fault_stays = stays, fault_log = log;
    calls = 0;
}

long fault_calls(void) { return calls; }

__attribute__((constructor)) static void from_environment(void) {
    const char* dir = getenv("FAULT_DIR");
    const char *at = getenv("FAULT_AT"), *how = getenv("FAULT_HOW"), *stays = getenv("FAULT_STAYS");
    const char* log = getenv("FAULT_LOG");
    if (dir == NULL) return;
    int code = how == NULL || !strcmp(how, "kill") ? KILL
               : !strcmp(how, "torn")              ? TORN
               : !strcmp(how, "term")              ? TERM
               : !strcmp(how, "int")               ? INTERRUPT
                                                   : atoi(how);
    fault_arm(dir, at ? atol(at) : 0, code, stays && *stays == '1', log ? atoi(log) : -1);
}

static int below(const char* path) { return prefix[0] && strncmp(path, prefix, strlen(prefix)) == 0; }

static int fd_below(int fd, char* path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    path[n < 0 ? 0 : n] = 0;
    return n > 0 && below(path);
}

static int path_below(int at, const char* path, char* full) {
    char base[PATH_MAX] = "";
    if (!prefix[0]) return 0;
    if (path[0] != '/' && at == AT_FDCWD && getcwd(base, sizeof base) == NULL) return 0;
    if (path[0] != '/' && at != AT_FDCWD) fd_below(at, base);
    snprintf(full, FULL, "%s%s%s", base, base[0] ? "/" : "", path);
    return below(full);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Count one call. 0: it goes on; TORN: the caller does half of it, then dies; else errno to fail with. */
static int count(const char* name, const char* path) {
    long n = ++calls;
    if (fault_log >= 0) {
        char line[FULL + 64];
        int length = snprintf(line, sizeof line, "%s %s\n", name, path);
        syscall(SYS_write, fault_log, line, (size_t)length);
    }
    if (fault_at == 0 || n < fault_at || (n > fault_at && !fault_stays)) return 0;
    if (fault_how == KILL || (fault_how == TORN && strstr(name, "write") == NULL)) die();
    if (fault_how == TERM || fault_how == INTERRUPT) {
        kill(getpid(), fault_how == TERM ? SIGTERM : SIGINT);
        return 0;
    }
    return fault_how;
}

#define NEXT(name) \
    static __typeof__(&name) next; \
    if (next == NULL) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define FAIL_IF(condition, name) \
    do { \
        char full[FULL]; \
        int code = (condition) ? count(name, full) : 0; \
        if (code != 0) { \
            errno = code; \
            return -1; \
        } \
    } while (0)

#define OPENS(name) \
    int name(const char* path, int flags, ...) { \
        NEXT(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        FAIL_IF(flags & (O_CREAT | O_TRUNC) && path_below(AT_FDCWD, path, full), "open"); \
        return next(path, flags, mode); \
    }
OPENS(open)
OPENS(open64)

#define OPENATS(name) \
    int name(int at, const char* path, int flags, ...) { \
        NEXT(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        FAIL_IF(flags & (O_CREAT | O_TRUNC) && path_below(at, path, full), "open"); \
        return next(at, path, flags, mode); \
    }
OPENATS(openat)
OPENATS(openat64)

ssize_t write(int fd, const void* data, size_t n) {
    NEXT(write);
    char path[FULL];
    int code = fd_below(fd, path) ? count("write", path) : 0;
    if (code == TORN) {
        next(fd, data, n / 2);
        die();
    }
    if (code != 0) {
        errno = code;
        return -1;
    }
    return next(fd, data, n);
}

#define PWRITES(name, offset_type) \
    ssize_t name(int fd, const void* data, size_t n, offset_type at) { \
        NEXT(name); \
        char path[FULL]; \
        int code = fd_below(fd, path) ? count("pwrite", path) : 0; \
        if (code == TORN) { \
            next(fd, data, n / 2, at); \
            die(); \
        } \
        if (code != 0) { \
            errno = code; \
            return -1; \
        } \
        return next(fd, data, n, at); \
    }
PWRITES(pwrite, off_t)
PWRITES(pwrite64, off64_t)

ssize_t copy_file_range(int in, off64_t* from, int out, off64_t* to, size_t n, unsigned flags) {
    NEXT(copy_file_range);
    FAIL_IF(fd_below(out, full), "copy_file_range");
    return next(in, from, out, to, n, flags);
}

#define TRUNCATES(name, offset_type) \
    int name(int fd, offset_type size) { \
        NEXT(name); \
        FAIL_IF(fd_below(fd, full), "ftruncate"); \
        return next(fd, size); \
    }
TRUNCATES(ftruncate, off_t)
TRUNCATES(ftruncate64, off64_t)

#define FALLOCATES(name, offset_type) \
    int name(int fd, int mode, offset_type at, offset_type n) { \
        NEXT(name); \
        FAIL_IF(fd_below(fd, full), "fallocate"); \
        return next(fd, mode, at, n); \
    }
FALLOCATES(fallocate, off_t)
FALLOCATES(fallocate64, off64_t)

/* These return the error instead of setting errno. */
#define POSIX_FALLOCATES(name, offset_type) \
    int name(int fd, offset_type at, offset_type n) { \
        NEXT(name); \
        char path[FULL]; \
        int code = fd_below(fd, path) ? count("fallocate", path) : 0; \
        return code != 0 ? code : next(fd, at, n); \
    }
POSIX_FALLOCATES(posix_fallocate, off_t)
POSIX_FALLOCATES(posix_fallocate64, off64_t)

#define SYNCS(name) \
    int name(int fd) { \
        NEXT(name); \
        FAIL_IF(fd_below(fd, full), #name); \
        return next(fd); \
    }
SYNCS(fsync)
SYNCS(fdatasync)

int sync_file_range(int fd, off64_t at, off64_t n, unsigned flags) {
    NEXT(sync_file_range);
    FAIL_IF(fd_below(fd, full), "sync_file_range");
    return next(fd, at, n, flags);
}

int rename(const char* from, const char* to) {
    NEXT(rename);
    FAIL_IF(path_below(AT_FDCWD, to, full), "rename");
    return next(from, to);
}

int renameat(int from_at, const char* from, int to_at, const char* to) {
    NEXT(renameat);
    FAIL_IF(path_below(to_at, to, full), "rename");
    return next(from_at, from, to_at, to);
}

int renameat2(int from_at, const char* from, int to_at, const char* to, unsigned flags) {
    NEXT(renameat2);
    FAIL_IF(path_below(to_at, to, full), "renameat2");
    return next(from_at, from, to_at, to, flags);
}

int link(const char* from, const char* to) {
    NEXT(link);
    FAIL_IF(path_below(AT_FDCWD, to, full), "link");
    return next(from, to);
}

int linkat(int from_at, const char* from, int to_at, const char* to, int flags) {
    NEXT(linkat);
    FAIL_IF(path_below(to_at, to, full), "link");
    return next(from_at, from, to_at, to, flags);
}

int unlink(const char* path) {
    NEXT(unlink);
    FAIL_IF(path_below(AT_FDCWD, path, full), "unlink");
    return next(path);
}

int unlinkat(int at, const char* path, int flags) {
    NEXT(unlinkat);
    FAIL_IF(path_below(at, path, full), flags & AT_REMOVEDIR ? "rmdir" : "unlink");
    return next(at, path, flags);
}

int rmdir(const char* path) {
    NEXT(rmdir);
    FAIL_IF(path_below(AT_FDCWD, path, full), "rmdir");
    return next(path);
}

int mkdir(const char* path, mode_t mode) {
    NEXT(mkdir);
    FAIL_IF(path_below(AT_FDCWD, path, full), "mkdir");
    return next(path, mode);
}

int mkdirat(int at, const char* path, mode_t mode) {
    NEXT(mkdirat);
    FAIL_IF(path_below(at, path, full), "mkdir");
    return next(at, path, mode);
}
