/* A file layer that keeps a record, for LD_PRELOAD: every write, truncation, sync, creation, rename and
 * removal below LOSING_FOLDER is appended to LOSING_RECORD after it was done, so that a test can put the
 * folder together as a power cut at any point could have left it.
 *
 * A record is one append: a header of seven 64-bit words - kind, key of the file, two numbers, lengths of
 * the two byte strings, magic - and the byte strings. A sync carries how long the record was when it
 * began: only what was recorded before that is surely covered. Whoever depends on a write (the same
 * process, or another that was let go on by a lock) does so after its record, so the order is sound.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) *(void **)&real = dlsym(RTLD_NEXT, name)
#define MOST 65536

static const char *folder;
static size_t folder_length;
static int record = -1;
static unsigned char ours[MOST]; /* descriptors of files below the folder */

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("LOSING_RECORD");
    folder = getenv("LOSING_FOLDER");
    if (!path || !folder) return;
    folder_length = strlen(folder);
    int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64");
    int fd = real(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0) abort();
    /* out of the way of whoever closes or counts descriptors */
    record = fcntl(fd, F_DUPFD_CLOEXEC, 900);
    close(fd);
    if (record < 0) abort();
}

static int64_t length(void) {
    struct stat info;
    return record < 0 || fstat(record, &info) ? 0 : info.st_size;
}

static void put(int64_t kind, int64_t key, int64_t one, int64_t two, const void *a, size_t a_length, const void *b, size_t b_length) {
    static ssize_t (*real)(int, const struct iovec *, int);
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "writev");
    int before = errno;
    int64_t head[7] = {kind, key, one, two, (int64_t)a_length, (int64_t)b_length, 0x4c4f53494e47};
    struct iovec parts[3] = {{head, sizeof head}, {(void *)a, a_length}, {(void *)b, b_length}};
    if (real(record, parts, 3) != (ssize_t)(sizeof head + a_length + b_length)) abort();
    errno = before;
}

static int64_t key_of(int fd) {
    struct stat info;
    return fstat(fd, &info) || !(S_ISREG(info.st_mode) || S_ISDIR(info.st_mode)) ? 0 : (int64_t)info.st_ino;
}

/* The absolute path, or nothing where it is not below the folder. SQLite's shared memory is memory: not a file that a cut leaves. */
static const char *below(int at, const char *path, char *buffer) {
    if (record < 0 || !path || (at != AT_FDCWD && path[0] != '/')) return NULL;
    if (path[0] == '/') {
        if (strlen(path) >= PATH_MAX) return NULL;
        strcpy(buffer, path);
    } else {
        if (!getcwd(buffer, PATH_MAX) || strlen(buffer) + strlen(path) + 2 > PATH_MAX) return NULL;
        strcat(buffer, "/");
        strcat(buffer, path);
    }
    size_t n = strlen(buffer);
    if (strncmp(buffer, folder, folder_length) || (buffer[folder_length] && buffer[folder_length] != '/')) return NULL;
    return n > 4 && !strcmp(buffer + n - 4, "-shm") ? NULL : buffer;
}

static int opened(int fd, int at, const char *path, int flags) {
    char buffer[PATH_MAX];
    if (fd < 0 || fd >= MOST) return fd;
    const char *full = below(at, path, buffer);
    ours[fd] = full != NULL;
    if (full) {
        put('O', key_of(fd), flags & O_CREAT ? 1 : 0, flags & O_TRUNC ? 1 : 0, full, strlen(full), "", 0);
    }
    return fd;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        return opened(real(path, flags, mode), AT_FDCWD, path, flags); \
    }
#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(int, #name, int, const char *, int, ...); \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        return opened(real(at, path, flags, mode), at, path, flags); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
    REAL(int, "close", int);
    if (fd >= 0 && fd < MOST) ours[fd] = 0;
    if (fd == record && record >= 0) return 0;
    return real(fd);
}

#define MINE(fd) (record >= 0 && (fd) >= 0 && (fd) < MOST && ours[fd] && key_of(fd))

ssize_t write(int fd, const void *data, size_t n) {
    REAL(ssize_t, "write", int, const void *, size_t);
    ssize_t done = real(fd, data, n);
    if (done > 0 && MINE(fd)) put('W', key_of(fd), lseek(fd, 0, SEEK_CUR) - done, 0, data, done, "", 0);
    return done;
}

#define PWRITE(name, off) \
    ssize_t name(int fd, const void *data, size_t n, off offset) { \
        REAL(ssize_t, #name, int, const void *, size_t, off); \
        ssize_t done = real(fd, data, n, offset); \
        if (done > 0 && MINE(fd)) put('W', key_of(fd), offset, 0, data, done, "", 0); \
        return done; \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define TRUNCATE(name, off) \
    int name(int fd, off size) { \
        REAL(int, #name, int, off); \
        int done = real(fd, size); \
        if (!done && MINE(fd)) put('T', key_of(fd), size, 0, "", 0, "", 0); \
        return done; \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

/* Nothing here outlives the machine: the syncs themselves need not be done. */
#define SYNC(name) \
    int name(int fd) { \
        int64_t covers = length(); \
        if (MINE(fd)) { \
            put('S', key_of(fd), covers, 0, "", 0, "", 0); \
            return 0; \
        } \
        REAL(int, #name, int); \
        return real(fd); \
    }
SYNC(fsync)
SYNC(fdatasync)

static void gone(int at, const char *path) {
    char buffer[PATH_MAX];
    const char *full = below(at, path, buffer);
    if (full) put('U', 0, 0, 0, full, strlen(full), "", 0);
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    int done = real(path);
    if (!done) gone(AT_FDCWD, path);
    return done;
}

int unlinkat(int at, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    int done = real(at, path, flags);
    if (!done) gone(at, path);
    return done;
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    int done = real(from, to);
    char one[PATH_MAX], two[PATH_MAX];
    const char *a = below(AT_FDCWD, from, one), *b = below(AT_FDCWD, to, two);
    if (!done && a && b) put('R', 0, 0, 0, a, strlen(a), b, strlen(b));
    return done;
}


/* The clock of a box that is started from what a cut left: LOSING_CLOCK nanoseconds are added to the time of day, so that
 * it goes on where the cut was. libfaketime cannot be used: the absolute sleeps of Python fail below it. */
int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    static int64_t shift;
    static int known;
    int done = real(clock, now);
    if (!known) {
        const char *word = getenv("LOSING_CLOCK");
        shift = word ? strtoll(word, NULL, 10) : 0;
        known = 1;
    }
    if (!done && clock == CLOCK_REALTIME && shift) {
        int64_t at = now->tv_sec * 1000000000LL + now->tv_nsec + shift;
        now->tv_sec = at / 1000000000LL;
        now->tv_nsec = at % 1000000000LL;
    }
    return done;
}
