/* Preloaded into a process: numbers its file operations below a folder, and lets one of them go wrong.

   Every operation of libc that changes a file or a name is counted from 1, whoever calls it (Python, Rust, C++).
   `shim_arm` says which one goes wrong and how; each is written to a log, from which a power cut can be played. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum fault { DIE, HALF, NO_SPACE, IO_ERROR }; /* the process ends after the operation or half of a write, or an error */

static char root[PATH_MAX];
static size_t root_size;
static long at, count;
static int fault, log_file = -1;
static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* At operation number `number` (0: never) below `folder` does `what`. */
void shim_arm(const char *folder, long number, int what, const char *log) {
    at = number, fault = what, count = 0;
    log_file = REAL(open)(log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0644);
    snprintf(root, sizeof root, "%s", folder);
    root_size = strlen(root);
}

static int below(const char *path) {
    return root_size && strncmp(path, root, root_size) == 0 && (path[root_size] == '/' || path[root_size] == 0);
}

/* The whole path of a name beside a folder's descriptor. */
static void whole(char *path, int folder, const char *name) {
    char base[PATH_MAX] = "";
    if (name[0] != '/') {
        char link[64] = "/proc/self/cwd";
        if (folder != AT_FDCWD) snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t size = readlink(link, base, sizeof base - 2);
        strcpy(base + (size < 0 ? 0 : size), "/");
    }
    snprintf(path, PATH_MAX, "%s%s", base, name);
}

static int path_of(char *path, int file) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    path[size < 0 ? 0 : size] = 0;
    return below(path);
}

struct operation {
    int fails, last; /* an errno, or 0; whether the process ends after it */
};

static struct operation begin(const char *name, const char *path, const char *target, int grows) {
    pthread_mutex_lock(&one_at_a_time);
    struct operation found = {0, 0};
    long number = ++count;
    if (at && number == at) {
        found.last = fault == DIE || fault == HALF;
        found.fails = fault == IO_ERROR ? EIO : 0;
    }
    if (at && number >= at && fault == NO_SPACE && grows) found.fails = ENOSPC; /* a full disk stays full */
    if (!found.fails) dprintf(log_file, "%s\t%s\t%s\n", name, path, target);
    else dprintf(log_file, "failed\t%s\t%s\n", path, name);
    return found;
}

static void end(struct operation done) {
    if (done.last) kill(getpid(), SIGKILL), pause();
    pthread_mutex_unlock(&one_at_a_time);
    if (done.fails) errno = done.fails;
}

#define CALL(type, failed, begun, call)           \
    do {                                          \
        struct operation now = begun;             \
        type result = now.fails ? failed : call;  \
        int error = errno;                        \
        end(now);                                 \
        if (!now.fails) errno = error;            \
        return result;                            \
    } while (0)

static const char *opening(const char *path, int flags) {
    if (access(path, F_OK)) return "create";
    return flags & O_TRUNC ? "truncate" : "open";
}

static int changes(int flags) {
    return (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) != 0;
}

#define MODE(flags)                                                     \
    mode_t mode = 0;                                                    \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                            \
        va_list more;                                                   \
        va_start(more, flags), mode = va_arg(more, mode_t), va_end(more); \
    }

#define OPEN(name)                                                                                  \
    int name(const char *file, int flags, ...) {                                                    \
        MODE(flags)                                                                                 \
        char path[PATH_MAX];                                                                        \
        whole(path, AT_FDCWD, file);                                                                \
        if (!changes(flags) || !below(path)) return REAL(name)(file, flags, mode);                  \
        CALL(int, -1, begin(opening(path, flags), path, "", flags & O_CREAT),                       \
             REAL(name)(file, flags, mode));                                                        \
    }
#define OPENAT(name)                                                                                \
    int name(int folder, const char *file, int flags, ...) {                                        \
        MODE(flags)                                                                                 \
        char path[PATH_MAX];                                                                        \
        whole(path, folder, file);                                                                  \
        if (!changes(flags) || !below(path)) return REAL(name)(folder, file, flags, mode);          \
        CALL(int, -1, begin(opening(path, flags), path, "", flags & O_CREAT),                       \
             REAL(name)(folder, file, flags, mode));                                                \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

static size_t part(struct operation now, size_t size) {
    return now.last && fault == HALF ? size / 2 : size;
}

#define ON_FILE(file, real)                     \
    char path[PATH_MAX];                        \
    if (!root_size || !path_of(path, file)) return real;

ssize_t write(int file, const void *data, size_t size) {
    ON_FILE(file, REAL(write)(file, data, size))
    CALL(ssize_t, -1, begin("write", path, "", 1), REAL(write)(file, data, part(now, size)));
}

#define PWRITE(name, offset_type)                                                          \
    ssize_t name(int file, const void *data, size_t size, offset_type offset) {            \
        ON_FILE(file, REAL(name)(file, data, size, offset))                                \
        CALL(ssize_t, -1, begin("write", path, "", 1), REAL(name)(file, data, part(now, size), offset)); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int file, const struct iovec *parts, int number) {
    ON_FILE(file, REAL(writev)(file, parts, number))
    CALL(ssize_t, -1, begin("write", path, "", 1), REAL(writev)(file, parts, (int)part(now, (size_t)number)));
}

ssize_t copy_file_range(int from, off64_t *read_at, int file, off64_t *write_at, size_t size, unsigned flags) {
    ON_FILE(file, REAL(copy_file_range)(from, read_at, file, write_at, size, flags))
    CALL(ssize_t, -1, begin("write", path, "", 1), REAL(copy_file_range)(from, read_at, file, write_at, part(now, size), flags));
}

#define SENDFILE(name, offset_type)                                                        \
    ssize_t name(int file, int from, offset_type *offset, size_t size) {                   \
        ON_FILE(file, REAL(name)(file, from, offset, size))                                \
        CALL(ssize_t, -1, begin("write", path, "", 1), REAL(name)(file, from, offset, part(now, size))); \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

#define TRUNCATE(name, size_type)                                                          \
    int name(int file, size_type size) {                                                   \
        ON_FILE(file, REAL(name)(file, size))                                              \
        CALL(int, -1, begin("write", path, "", 1), REAL(name)(file, size));                \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define SYNC(name)                                                                         \
    int name(int file) {                                                                   \
        ON_FILE(file, REAL(name)(file))                                                    \
        CALL(int, -1, begin("fsync", path, "", 0), REAL(name)(file));                      \
    }
SYNC(fsync)
SYNC(fdatasync)

#define ON_NAME(folder, name, real)             \
    char path[PATH_MAX];                        \
    whole(path, folder, name);                  \
    if (!below(path)) return real;

int mkdir(const char *name, mode_t mode) {
    ON_NAME(AT_FDCWD, name, REAL(mkdir)(name, mode))
    CALL(int, -1, begin(access(path, F_OK) ? "mkdir" : "nothing", path, "", 1), REAL(mkdir)(name, mode));
}

int unlink(const char *name) {
    ON_NAME(AT_FDCWD, name, REAL(unlink)(name))
    CALL(int, -1, begin("unlink", path, "", 0), REAL(unlink)(name));
}

int unlinkat(int folder, const char *name, int flags) {
    ON_NAME(folder, name, REAL(unlinkat)(folder, name, flags))
    CALL(int, -1, begin("unlink", path, "", 0), REAL(unlinkat)(folder, name, flags));
}

int rmdir(const char *name) {
    ON_NAME(AT_FDCWD, name, REAL(rmdir)(name))
    CALL(int, -1, begin("unlink", path, "", 0), REAL(rmdir)(name));
}

int rename(const char *name, const char *new_name) {
    ON_NAME(AT_FDCWD, name, REAL(rename)(name, new_name))
    char target[PATH_MAX];
    whole(target, AT_FDCWD, new_name);
    CALL(int, -1, begin("rename", path, target, 0), REAL(rename)(name, new_name));
}

int renameat2(int folder, const char *name, int new_folder, const char *new_name, unsigned flags) {
    ON_NAME(folder, name, REAL(renameat2)(folder, name, new_folder, new_name, flags))
    char target[PATH_MAX];
    whole(target, new_folder, new_name);
    CALL(int, -1, begin(flags & RENAME_EXCHANGE ? "exchange" : "rename", path, target, 0),
         REAL(renameat2)(folder, name, new_folder, new_name, flags));
}

int renameat(int folder, const char *name, int new_folder, const char *new_name) {
    return renameat2(folder, name, new_folder, new_name, 0);
}
