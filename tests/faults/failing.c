/* A machine that fails, for LD_PRELOAD: what a test writes into FAILING_CONTROL, a file that is mapped here, fails from that
 * moment on, in every process that has it, and works again when the test takes it back. Of files, only those below
 * FAILING_FOLDER fail, each kind by itself. Every failure is counted, so that a test knows that its fault was met.
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
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) *(void **)&real = dlsym(RTLD_NEXT, name)
#define MOST 65536

enum kind {NONE, DATABASE = 1, LOG = 2, OTHER = 4};

/* failing.py names these words in this order. */
static volatile struct control {
    int64_t files;    /* the kinds of files that fail */
    int64_t write;    /* errno of what writes or grows a file, 0 while it works */
    int64_t room;     /* octets that are written before that, -1 for none */
    int64_t create;   /* errno of what opens for writing, creates, renames or removes */
    int64_t sync;     /* errno of fsync and fdatasync */
    int64_t read;
    int64_t accept;   /* errno of accept */
    int64_t fork;     /* errno of fork */
    int64_t memory;   /* allocations of so many octets or more fail; 0 for none */
    int64_t met;      /* failures so far */
} nothing, *control = &nothing;

static const char *folder;
static size_t folder_length;
static unsigned char kinds[MOST]; /* of open descriptors */

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAILING_CONTROL");
    folder = getenv("FAILING_FOLDER");
    if (!path || !folder) return;
    folder_length = strlen(folder);
    int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64");
    int fd = real(path, O_RDWR | O_CLOEXEC);
    void *map = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) abort();
    close(fd);
    control = map;
}

static int fail(int64_t error) {
    __atomic_add_fetch(&control->met, 1, __ATOMIC_SEQ_CST);
    errno = (int)error;
    return -1;
}

static enum kind kind_of(const char *path) {
    char buffer[PATH_MAX];
    if (control == &nothing) return NONE;
    if (path[0] != '/') {
        if (!getcwd(buffer, PATH_MAX) || strlen(buffer) + strlen(path) + 2 > PATH_MAX) return NONE;
        strcat(strcat(buffer, "/"), path);
        path = buffer;
    }
    if (strncmp(path, folder, folder_length) || (path[folder_length] && path[folder_length] != '/')) return NONE;
    const char *name = strrchr(path, '/');
    /* The lock is no part of it: whoever holds it has it open from before. */
    if (strstr(name, ".lock")) return OTHER;
    return strstr(name, ".db3") ? DATABASE : strstr(name, ".log") ? LOG : OTHER;
}

#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & (O_CREAT | O_TRUNC)))
#define BAD(kind, what) (control->what && (control->files & (kind)))

static int opened(int fd, enum kind kind) {
    if (fd >= 0 && fd < MOST) kinds[fd] = kind;
    return fd;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        enum kind kind = kind_of(path); \
        if (WRITES(flags) && BAD(kind, create)) return fail(control->create); \
        return opened(real(path, flags, mode), kind); \
    }
#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(int, #name, int, const char *, int, ...); \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        enum kind kind = at == AT_FDCWD || path[0] == '/' ? kind_of(path) : NONE; \
        if (WRITES(flags) && BAD(kind, create)) return fail(control->create); \
        return opened(real(at, path, flags, mode), kind); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
    REAL(int, "close", int);
    if (fd >= 0 && fd < MOST) kinds[fd] = NONE;
    return real(fd);
}

#define OF(fd) ((fd) >= 0 && (fd) < MOST ? kinds[fd] : NONE)

/* May so much be written? As much as there is room for is; a disk that is full takes the beginning of a write. */
static ssize_t room_for(int fd, size_t n) {
    if (!BAD(OF(fd), write)) return n;
    if (control->room < 0) return fail(control->write);
    int64_t left = __atomic_fetch_sub(&control->room, n, __ATOMIC_SEQ_CST);
    if (left >= (int64_t)n) return n;
    control->room = 0;
    return left > 0 ? left : fail(control->write);
}

ssize_t write(int fd, const void *data, size_t n) {
    REAL(ssize_t, "write", int, const void *, size_t);
    ssize_t fits = room_for(fd, n);
    return fits < 0 ? -1 : real(fd, data, fits);
}

#define PWRITE(name, off) \
    ssize_t name(int fd, const void *data, size_t n, off offset) { \
        REAL(ssize_t, #name, int, const void *, size_t, off); \
        ssize_t fits = room_for(fd, n); \
        return fits < 0 ? -1 : real(fd, data, fits, offset); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

/* Only what grows a file needs room; a file system that is read-only refuses either. */
#define TRUNCATE(name, off) \
    int name(int fd, off size) { \
        REAL(int, #name, int, off); \
        struct stat info; \
        if (BAD(OF(fd), write) && (control->write != ENOSPC || (!fstat(fd, &info) && size > info.st_size && control->room <= 0))) return fail(control->write); \
        return real(fd, size); \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define ALLOCATE(name, off) \
    int name(int fd, int mode, off offset, off length) { \
        REAL(int, #name, int, int, off, off); \
        if (BAD(OF(fd), write) && control->room <= 0) return fail(control->write); \
        return real(fd, mode, offset, length); \
    }
ALLOCATE(fallocate, off_t)
ALLOCATE(fallocate64, off64_t)

#define POSIX_ALLOCATE(name, off) \
    int name(int fd, off offset, off length) { \
        REAL(int, #name, int, off, off); \
        if (BAD(OF(fd), write) && control->room <= 0) return fail(control->write), (int)control->write; \
        return real(fd, offset, length); \
    }
POSIX_ALLOCATE(posix_fallocate, off_t)
POSIX_ALLOCATE(posix_fallocate64, off64_t)

/* As the kernel does it: the error is told, and what was to be synced is taken for clean. */
#define SYNC(name) \
    int name(int fd) { \
        REAL(int, #name, int); \
        return BAD(OF(fd), sync) ? fail(control->sync) : real(fd); \
    }
SYNC(fsync)
SYNC(fdatasync)

ssize_t read(int fd, void *data, size_t n) {
    REAL(ssize_t, "read", int, void *, size_t);
    return BAD(OF(fd), read) ? fail(control->read) : real(fd, data, n);
}

#define PREAD(name, off) \
    ssize_t name(int fd, void *data, size_t n, off offset) { \
        REAL(ssize_t, #name, int, void *, size_t, off); \
        return BAD(OF(fd), read) ? fail(control->read) : real(fd, data, n, offset); \
    }
PREAD(pread, off_t)
PREAD(pread64, off64_t)

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    return BAD(kind_of(path), create) && control->create == EROFS ? fail(EROFS) : real(path);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return BAD(kind_of(to), create) ? fail(control->create) : real(from, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return BAD(kind_of(path), create) ? fail(control->create) : real(path, mode);
}

int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags) {
    REAL(int, "accept4", int, struct sockaddr *, socklen_t *, int);
    return control->accept ? fail(control->accept) : real(fd, address, length, flags);
}

pid_t fork(void) {
    REAL(pid_t, "fork", void);
    return control->fork ? fail(control->fork) : real();
}

#define TOO_LARGE(n) (control->memory && (int64_t)(n) >= control->memory)

void *malloc(size_t n) {
    REAL(void *, "malloc", size_t);
    return TOO_LARGE(n) ? fail(ENOMEM), NULL : real(n);
}

int posix_memalign(void **found, size_t alignment, size_t n) {
    REAL(int, "posix_memalign", void **, size_t, size_t);
    return TOO_LARGE(n) ? fail(ENOMEM), ENOMEM : real(found, alignment, n);
}

void *aligned_alloc(size_t alignment, size_t n) {
    REAL(void *, "aligned_alloc", size_t, size_t);
    return TOO_LARGE(n) ? fail(ENOMEM), NULL : real(alignment, n);
}

static void *real_mmap(void *at, size_t n, int protection, int flags, int fd, off64_t offset) {
    REAL(void *, "mmap64", void *, size_t, int, int, int, off64_t);
    return real(at, n, protection, flags, fd, offset);
}

void *mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset) {
    return TOO_LARGE(n) && fd < 0 ? fail(ENOMEM), MAP_FAILED : real_mmap(at, n, protection, flags, fd, offset);
}

void *mmap64(void *at, size_t n, int protection, int flags, int fd, off64_t offset) {
    return mmap(at, n, protection, flags, fd, offset);
}
