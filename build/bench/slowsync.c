/* A disk whose sync takes SLOWSYNC_MS, for LD_PRELOAD: cc -O2 -shared -fPIC -o slowsync.so slowsync.c -ldl.
 * A device syncs once at a time: all processes wait for one another at the file that SLOWSYNC_LOCK names. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

static void wait_for_disk(void) {
    const char *ms = getenv("SLOWSYNC_MS"), *lock = getenv("SLOWSYNC_LOCK");
    if (!ms || !lock) return;
    int fd = open(lock, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd >= 0) flock(fd, LOCK_EX);
    struct timespec left = {atol(ms) / 1000, atol(ms) % 1000 * 1000000L};
    while (nanosleep(&left, &left)) {}
    if (fd >= 0) close(fd);
}

static int pass_on(const char *name, int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    wait_for_disk();
    return real(fd);
}

int fsync(int fd) { return pass_on("fsync", fd); }
int fdatasync(int fd) { return pass_on("fdatasync", fd); }
