/* A file layer with faults, for LD_PRELOAD: below Python and all libraries that use the C library's names.
 *
 *   FAULTY_FOLDER        files whose path has this in it
 *   FAULTY_SLOW_BYTES_S  reach the disk at so many bytes a second, and each fsync takes 50 ms more
 *   FAULTY_STALE_S       are not seen for so many seconds after the first look at one of them, by ranks other than
 *   FAULTY_WRITER_RANK   the one that wrote them: as on a client of a network file system with an old view of a folder
 *   FAULTY_STALE_NAME    and only those whose path has this in it too
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int meant(const char *path, const char *more) {
    const char *folder = getenv("FAULTY_FOLDER");
    return path && folder && strstr(path, folder) && (!more || strstr(path, more));
}

static int unseen(const char *path) {
    static double first;
    const char *seconds = getenv("FAULTY_STALE_S"), *rank = getenv("RANK"), *writer = getenv("FAULTY_WRITER_RANK");
    if (!seconds || !rank || !writer || !strcmp(rank, writer) || !meant(path, getenv("FAULTY_STALE_NAME")))
        return 0;
    if (first == 0)
        first = now();
    return now() - first < atof(seconds);
}

static void late(int handle, double bytes, double seconds) {
    const char *rate = getenv("FAULTY_SLOW_BYTES_S");
    char link[64], path[4096];
    if (!rate)
        return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0)
        return;
    path[length] = 0;
    if (meant(path, NULL)) {
        double wait = bytes / atof(rate) + seconds;
        struct timespec t = {(time_t)wait, (long)((wait - (time_t)wait) * 1e9)};
        nanosleep(&t, NULL);
    }
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define NOT_SEEN(path) do { if (unseen(path)) { errno = ENOENT; return -1; } } while (0)

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                                        \
        va_end(more);                                                                                                  \
        NOT_SEEN(path);                                                                                                \
        return REAL(name)(path, flags, mode);                                                                          \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                                   \
    int name(int folder, const char *path, int flags, ...) {                                                           \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                                        \
        va_end(more);                                                                                                  \
        NOT_SEEN(path);                                                                                                \
        return REAL(name)(folder, path, flags, mode);                                                                  \
    }
OPENAT(openat)
OPENAT(openat64)

#define STAT(name, type)                                                                                               \
    int name(const char *path, struct type *out) {                                                                     \
        NOT_SEEN(path);                                                                                                \
        return REAL(name)(path, out);                                                                                  \
    }
STAT(stat, stat)
STAT(lstat, stat)
STAT(stat64, stat64)
STAT(lstat64, stat64)

#define FSTATAT(name, type)                                                                                            \
    int name(int folder, const char *path, struct type *out, int flags) {                                              \
        NOT_SEEN(path);                                                                                                \
        return REAL(name)(folder, path, out, flags);                                                                   \
    }
FSTATAT(fstatat, stat)
FSTATAT(fstatat64, stat64)

int statx(int folder, const char *restrict path, int flags, unsigned mask, struct statx *restrict out) {
    NOT_SEEN(path);
    return REAL(statx)(folder, path, flags, mask, out);
}

ssize_t write(int handle, const void *data, size_t count) {
    ssize_t written = REAL(write)(handle, data, count);
    if (written > 0 && count > 512)
        late(handle, written, 0);
    return written;
}

int fsync(int handle) {
    int done = REAL(fsync)(handle);
    late(handle, 0, 0.05);
    return done;
}
