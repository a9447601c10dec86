"""The `__main__` of microauthd.pyz.

`mad` runs from the archive itself. The server is unpacked once into a cache folder and runs from there, because native
modules cannot be loaded from a zip file. Only root and the user may be able to write to that folder: anybody who can
replaces the program. The first lines use only syntax that an old Python can parse, so that it can print the message.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit("microauthd needs Python 3.11 or newer; this is %d.%d" % sys.version_info[:2])

ARCHIVE = __file__[: -len("/__main__.py")]


def run_mad():
    """Run `mad` if the archive was started by a symlink of that name or with `mad` as the first argument."""
    if sys.argv[0].rpartition("/")[2] == "mad":
        args = sys.argv[1:]
    elif sys.argv[1:2] == ["mad"]:
        args = sys.argv[2:]
    else:
        return
    # The archive holds mad compiled for the versions that were at hand; any other compiles it in 100 ms.
    sys.path[0] = ARCHIVE + "/site-packages"
    sys.path.insert(0, ARCHIVE + "/pyc/" + sys.implementation.cache_tag)
    try:
        import mad
    except Exception as error:
        sys.exit("mad: error: this file is damaged, copy it anew: %s" % error)
    sys.exit(mad.main(args))


run_mad()

import errno  # noqa: E402
import fcntl  # noqa: E402
import gc  # noqa: E402
import hashlib  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import stat  # noqa: E402
import tempfile  # noqa: E402
import zipfile  # noqa: E402
from _imp import extension_suffixes  # noqa: E402

SUFFIX = extension_suffixes()[0]  # .cpython-311-x86_64-linux-gnu.so
TAG = SUFFIX[1:-3]
PLATFORM = TAG.split("-", 2)[-1]  # x86_64-linux-gnu
# A start that could not load the unpacked tree names that tree here before it executes itself again.
FAILED_TREE_VARIABLE = "MICROAUTHD_DOUBTED_TREE"


def fail(sentence):
    """Print a message and exit with status 1."""
    sys.exit("microauthd: " + sentence)


def cache_root():
    """Return the folder for unpacked trees, after check_ownership() of it and of every folder above it."""
    root = os.environ.get("MICROAUTHD_CACHE") or os.environ.get("CACHE_DIRECTORY", "").split(":")[0]
    if not root:
        home = os.path.expanduser("~")
        if not os.path.isabs(home) or not os.path.isdir(home):
            fail("there is no home folder to unpack into; name one in MICROAUTHD_CACHE")
        root = os.path.join(home, ".cache", "microauthd")
    root = os.path.abspath(root)
    os.makedirs(root, mode=0o700, exist_ok=True)
    root = os.path.realpath(root)
    folder = root
    while True:
        check_ownership(folder, sticky_allowed=folder != root)
        if folder == "/":
            return root
        folder = os.path.dirname(folder)


def check_ownership(folder, sticky_allowed=False):
    """Fail unless the folder belongs to root or the user, and nobody else can write to it.

    In a folder with the sticky bit, such as /tmp, others can create entries but not replace ours.
    """
    info = os.lstat(folder)
    others_write = info.st_mode & 0o022 and not (sticky_allowed and info.st_mode & stat.S_ISVTX)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid not in (0, os.geteuid()) or others_write:
        fail("refusing to run code from the cache: %s belongs to somebody else or can be written by others" % folder)


def lock_tree(tree, exclusively):
    """Lock a tree: shared to run from it, exclusively to remove it. Return the descriptor, or None if it is busy.

    Who may not open the lock of a tree of root's runs from it without one: see make_lock().
    """
    try:
        descriptor = os.open(os.path.join(tree, ".lock"), os.O_RDONLY)
    except PermissionError:
        return None if exclusively else os.open(tree, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusively else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    if not os.fstat(descriptor).st_nlink:  # The tree was removed between open() and flock().
        os.close(descriptor)
        return None
    return descriptor


def make_lock(folder, root):
    """Make the lock of a tree, for its owner and the group of the root alone.

    Whoever can open a file can lock it, for as long as they like, and so keep everybody else from running it. flock(2)
    """
    descriptor = os.open(os.path.join(folder, ".lock"), os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o640)
    if not os.geteuid():  # it may be for the user of a service
        os.fchown(descriptor, -1, os.stat(root).st_gid)
    os.close(descriptor)


def compile_tree(folder, tree):
    """Compile every module of a folder that will be renamed to `tree`, on all cores.

    compileall does not report a short write on a full disk, and the truncated module would fail at every later start.
    The .pyc files are unchecked (PEP 552), because the sources never change.
    """
    paths = [os.path.join(base, name) for base, _, names in os.walk(folder) for name in names if name.endswith(".py")]
    paths.sort(key=os.path.getsize, reverse=True)
    for base in {os.path.dirname(path) for path in paths}:
        os.makedirs(os.path.join(base, "__pycache__"), exist_ok=True)
    workers, pids = len(os.sched_getaffinity(0)), []
    try:
        for number in range(1, workers):
            pid = os.fork()
            if pid == 0:
                status = 255
                try:
                    compile_all(paths[number::workers], folder, tree)
                    status = 0
                except OSError as error:
                    status = error.errno or status
                finally:
                    os._exit(status)
            pids.append(pid)
        compile_all(paths[::workers], folder, tree)
    finally:
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    for status in filter(None, statuses):
        raise OSError(status, os.strerror(status)) if 0 < status < 255 else OSError("compiling it failed")


def compile_all(paths, folder, tree):
    """Compile these modules of a folder that will be renamed to `tree`."""
    import marshal
    import warnings
    from importlib.util import MAGIC_NUMBER, source_hash

    for path in paths:
        with open(path, "rb") as file:
            source = file.read()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = compile(source, tree + path[len(folder) :], "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            continue  # The module is for another Python version, which reads the source.
        base, name = os.path.split(path)
        with open(os.path.join(base, "__pycache__", name[:-2] + sys.implementation.cache_tag + ".pyc"), "xb") as file:
            file.write(MAGIC_NUMBER + b"\1\0\0\0" + source_hash(source) + marshal.dumps(code))  # flags: PEP 552


def builds_of(archive):
    """Return a sentence on the Python versions and platforms that an archive has native modules for."""
    tags_by_platform = {}
    for name in archive.namelist():
        if name.startswith("native/") and ".cpython-" in name:
            tag = name.rpartition(".cpython-")[2]
            tags_by_platform.setdefault(name.split("/")[1], set()).add("%s.%s" % (tag[0], tag[1:].partition("-")[0]))
    return "; ".join(
        "on %s for CPython %s" % (platform, ", ".join(sorted(tags, key=lambda tag: (len(tag), tag))))
        for platform, tags in sorted(tags_by_platform.items())
    )


def members_of(archive):
    """Return (name in the archive, path in the tree, size) of each file that this Python on this platform needs."""
    native = "native/" + PLATFORM + "/"
    members = []
    for info in archive.infolist():
        name = info.filename
        if name.startswith(native):
            relative_path = name[len(native) :]
        elif name.startswith("site-packages/"):
            relative_path = name[len("site-packages/") :]
        else:
            continue
        if ".cpython-" in relative_path and relative_path.endswith(".so") and not relative_path.endswith(SUFFIX):
            continue  # for another Python version
        members.append((name, relative_path, info.file_size))
    if not any(name.startswith(native) and name.endswith(SUFFIX) for name, _, _ in members):
        fail("this file has no build for %s; it has builds %s" % (TAG, builds_of(archive)))
    return members


def lock_if_complete(members, tree):
    """Return the shared lock of a tree, or None if a file is missing or truncated.

    Programs that clean caches may delete single files.
    """
    try:
        complete = all(os.lstat(tree + "/" + relative_path).st_size == size for _, relative_path, size in members)
    except OSError:
        complete = False
    return lock_tree(tree, exclusively=False) if complete else None


BLOCK = 4096  # as in build/delta.py


def restore_block(difference, at, base, shift):
    """Return the block at this place of a module that is stored as its difference from another: build/delta.py."""
    if shift is None:
        return difference
    same = base[at + shift : at + shift + len(difference)]
    block = int.from_bytes(difference, "little") ^ int.from_bytes(same, "little")
    return block.to_bytes(len(difference), "little")


def read_blocks(archive, name, deltas):
    """Yield the content of a file of the archive, block by block: little memory may be left for it."""
    base_name, shifts = deltas.get(name, ("", ()))
    base = archive.read(base_name) if base_name else b""
    with archive.open(name) as source:
        for number, block in enumerate(iter(lambda: source.read(BLOCK), b"")):
            yield restore_block(block, number * BLOCK, base, shifts[number]) if base_name else block


def unpack(archive, members, root, tree):
    """Unpack and compile into a temporary folder, sync it, rename it to `tree`. The caller holds the root's lock."""
    listing = "".join("%s %d %d\n" % (info.filename, info.file_size, info.CRC) for info in archive.infolist())
    if hashlib.sha256(listing.encode()).hexdigest().encode() != archive.comment:
        raise zipfile.BadZipFile("its directory is not the one it was built with")
    import json

    deltas = json.loads(archive.read("deltas.json"))
    temporary = tempfile.mkdtemp(prefix="tmp.", dir=root)
    try:
        for name, relative_path, _ in members:
            path = os.path.join(temporary, relative_path)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "xb") as target:
                # Small writes: the page cache uses large folios for large ones, which later count as resident memory.
                target.writelines(read_blocks(archive, name, deltas))
        # Compile now: later starts may run as a user who cannot write here.
        compile_tree(temporary, tree)
        make_lock(temporary, root)
        # Who may read the cache may read the tree: root unpacks a service's program for the user of that service.
        os.chmod(temporary, stat.S_IMODE(os.stat(root).st_mode))
        # Sync before the rename: a power cut leaves either a tmp folder or a complete tree.
        os.sync()
        os.rename(temporary, tree)
        descriptor = os.open(root, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_tree(root, path):
    """Remove a tree. Rename it first, so that a power cut leaves no incomplete tree under this name."""
    trash = tempfile.mkdtemp(prefix="tmp.", dir=root)
    try:
        os.rename(path, trash)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # overlayfs does not rename a folder of a lower layer: that of a container's image. rename(2)
        shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(trash, ignore_errors=True)


def remove_stale_trees(root, tree):
    """Remove temporary folders, and the trees of other releases that no process runs from."""
    for name in os.listdir(root):
        path = os.path.join(root, name)
        if path == tree or not os.path.isdir(path) or os.path.islink(path):
            continue
        if name.startswith("tmp."):
            shutil.rmtree(path, ignore_errors=True)
        elif name.startswith("tree."):
            descriptor = lock_tree(path, exclusively=True)
            if descriptor is not None:
                remove_tree(root, path)
                os.close(descriptor)


def check_limits():
    """Fail if the program cannot be unpacked and loaded within these limits. getrlimit(2)."""
    for limit, name, least, needed in (
        (resource.RLIMIT_NOFILE, "open files (ulimit -n)", 16, "16"),
        (resource.RLIMIT_AS, "address space (ulimit -v)", 96 << 20, "96 MB"),
    ):
        allowed = resource.getrlimit(limit)[0]
        if allowed != resource.RLIM_INFINITY and allowed < least:
            fail("the limit of %s is too low: the program needs %s" % (name, needed))


def main():
    check_limits()
    # Shiv's variables name another entry point or folder. This program ignores them and passes them to no child.
    for name in [name for name in os.environ if name.startswith("SHIV_")]:
        del os.environ[name]
    umask = os.umask(0o022)
    try:
        root = cache_root()
        with zipfile.ZipFile(ARCHIVE) as archive:
            tree = os.path.join(root, "tree." + archive.read("build-id").decode() + "." + TAG)
            members, lock = members_of(archive), None
            failed_to_load = os.environ.pop(FAILED_TREE_VARIABLE, "") == tree
            if os.path.isdir(tree):
                check_ownership(tree)
                lock = None if failed_to_load else lock_if_complete(members, tree)
            if lock is None:
                with open(os.path.join(root, ".lock"), "a") as lock_file:
                    os.fchmod(lock_file.fileno(), 0o600)  # others could hold it for ever
                    fcntl.flock(lock_file, fcntl.LOCK_EX)
                    remove_stale_trees(root, tree)
                    if os.path.isdir(tree):
                        lock = None if failed_to_load else lock_if_complete(members, tree)
                        if lock is None:
                            remove_tree(root, tree)
                    if lock is None:
                        unpack(archive, members, root, tree)
                        lock = lock_if_complete(members, tree)
                    check_ownership(tree)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fail("no room to unpack the program; free some, or name another folder in MICROAUTHD_CACHE")
        fail("the program cannot be unpacked: %s" % error)
    except Exception as error:  # zipfile and zlib raise many types for a damaged archive.
        fail("the program cannot be unpacked, this file is damaged, copy it anew: %s" % error)
    finally:
        os.umask(umask)
    if lock is None:
        fail("the program in %s does not stay whole: this file is damaged, or somebody cleans that folder" % tree)
    os.set_inheritable(lock, True)  # Every process that runs from the tree holds the lock.
    sys.path[0] = tree
    # The collector would run 80 times during the imports, a tenth of their time, and find nothing. What they have made
    # stays as long as the process does, so it is left out of every later collection too.
    gc.disable()
    try:
        from appliance.commands import main as run_microauthd
    except Exception as error:
        if "failed to map segment" in str(error):
            fail("%s is on a file system mounted noexec; name another folder in MICROAUTHD_CACHE" % tree)
        if failed_to_load:
            raise
        # The tree is most likely damaged: unpack it once more.
        sys.stderr.write("microauthd: the unpacked program does not load (%r); unpacking it again\n" % error)
        os.environ[FAILED_TREE_VARIABLE] = tree
        os.close(lock)
        os.execv(sys.executable, sys.orig_argv)
    gc.freeze()
    gc.enable()
    sys.exit(run_microauthd())


main()
