"""The `__main__` of microauthd.pyz.

`mad` runs straight from the archive. Everything else is unpacked once into a cache folder that
nobody else can write, because whoever writes there is the program; then it runs from there.
The first lines keep to syntax that an old Python can read, so that it can say what it lacks.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit("microauthd needs Python 3.11 or newer; this is %d.%d" % sys.version_info[:2])

ARCHIVE = __file__[: -len("/__main__.py")]


def mad():
    """Run `mad` when it is asked for, by the name of a symlink or as the first word; without unpacking anything."""
    if sys.argv[0].rpartition("/")[2] == "mad":
        words = sys.argv[1:]
    elif sys.argv[1:2] == ["mad"]:
        words = sys.argv[2:]
    else:
        return
    # Compiled for this Python where the archive has it; a hundred milliseconds of compiling otherwise.
    sys.path[0] = ARCHIVE + "/site-packages"
    sys.path.insert(0, ARCHIVE + "/pyc/" + sys.implementation.cache_tag)
    try:
        import mad
    except Exception as error:
        sys.exit("mad: error: this file is damaged, copy it anew: %s" % error)
    sys.exit(mad.main(words))


mad()

import errno  # noqa: E402
import fcntl  # noqa: E402
import hashlib  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import stat  # noqa: E402
import tempfile  # noqa: E402
import zipfile  # noqa: E402
from _imp import extension_suffixes  # noqa: E402

SUFFIX = extension_suffixes()[0]  # .cpython-311-x86_64-linux-gnu.so
TAG = SUFFIX[1:-3]
PLATFORM = TAG.split("-", 2)[2]  # x86_64-linux-gnu
DOUBTED = "MICROAUTHD_DOUBTED_TREE"  # from a start that could not load this tree to itself


def refuse(sentence):
    sys.exit("microauthd: " + sentence)


def cache_root():
    """Return the folder for unpacked code. It and every parent must be root's or ours, and not writable by others."""
    root = os.environ.get("MICROAUTHD_CACHE") or os.environ.get("CACHE_DIRECTORY", "").split(":")[0]
    if not root:
        home = os.path.expanduser("~")
        if not os.path.isabs(home) or not os.path.isdir(home):
            refuse("there is no home folder to unpack into; name one in MICROAUTHD_CACHE")
        root = os.path.join(home, ".cache", "microauthd")
    root = os.path.abspath(root)
    os.makedirs(root, mode=0o700, exist_ok=True)
    root = os.path.realpath(root)
    folder = root
    while True:
        check_folder(folder, sticky_is_fine=folder != root)
        if folder == "/":
            return root
        folder = os.path.dirname(folder)


def check_folder(folder, sticky_is_fine=False):
    info = os.lstat(folder)
    others_write = info.st_mode & 0o022 and not (sticky_is_fine and info.st_mode & stat.S_ISVTX)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid not in (0, os.geteuid()) or others_write:
        refuse("refusing to run code from the cache: %s belongs to somebody else or can be written by others" % folder)


def hold(tree, exclusively):
    """Take the lock of a tree: shared while running from it, exclusive to remove it. None where that cannot be."""
    try:
        descriptor = os.open(os.path.join(tree, ".lock"), os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusively else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    if not os.fstat(descriptor).st_nlink:  # the tree was removed between the two calls: this is no lock on anything
        os.close(descriptor)
        return None
    return descriptor


def compile_tree(folder, tree):
    """Compile every module of a folder that will be called `tree`, on all cores.

    Not by compileall: on a full disk its writes fall short without an error, and a module cut off is
    refused at every start from then on. Unchecked, because nothing here changes once it has its name.
    """
    paths = [os.path.join(base, name) for base, _, names in os.walk(folder) for name in names if name.endswith(".py")]
    paths.sort(key=os.path.getsize, reverse=True)
    for base in {os.path.dirname(path) for path in paths}:
        os.makedirs(os.path.join(base, "__pycache__"), exist_ok=True)
    hands, children = len(os.sched_getaffinity(0)), []
    try:
        for number in range(1, hands):
            child = os.fork()
            if child == 0:
                status = 255
                try:
                    compile_all(paths[number::hands], folder, tree)
                    status = 0
                except OSError as error:
                    status = error.errno or status
                finally:
                    os._exit(status)
            children.append(child)
        compile_all(paths[::hands], folder, tree)
    finally:
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for status in filter(None, statuses):
        raise OSError(status, os.strerror(status)) if 0 < status < 255 else OSError("compiling it failed")


def compile_all(paths, folder, tree):
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
            continue  # meant for another Python; the source stands
        base, name = os.path.split(path)
        with open(os.path.join(base, "__pycache__", name[:-2] + sys.implementation.cache_tag + ".pyc"), "xb") as file:
            file.write(MAGIC_NUMBER + b"\1\0\0\0" + source_hash(source) + marshal.dumps(code))  # flags: PEP 552


def members_of(archive):
    """Return (name in the archive, path in the tree, bytes) of each file that this Python and this machine need."""
    native = "native/" + PLATFORM + "/"
    members = []
    for info in archive.infolist():
        name = info.filename
        if name.startswith(native):
            inside = name[len(native) :]
        elif name.startswith("site-packages/"):
            inside = name[len("site-packages/") :]
        else:
            continue
        if ".cpython-" in inside and inside.endswith(".so") and not inside.endswith(SUFFIX):
            continue  # for another Python
        members.append((name, inside, info.file_size))
    if not any(name.startswith(native) and name.endswith(SUFFIX) for name, _, _ in members):
        refuse("this file has no build for %s" % TAG)
    return members


def use(members, tree):
    """Return the shared lock of a tree, or None where a file is missing or cut off: caches are cleaned, a file at a
    time, too.
    """
    try:
        whole = all(os.lstat(tree + "/" + inside).st_size == size for _, inside, size in members)
    except OSError:
        whole = False
    return hold(tree, exclusively=False) if whole else None


def unpack(archive, members, root, tree):
    """Unpack, compile and sync into a fresh folder, then give it its name. The root's lock is held."""
    listing = "".join("%s %d %d\n" % (info.filename, info.file_size, info.CRC) for info in archive.infolist())
    if hashlib.sha256(listing.encode()).hexdigest().encode() != archive.comment:
        raise zipfile.BadZipFile("its directory is not the one it was built with")
    temporary = tempfile.mkdtemp(prefix="tmp.", dir=root)
    try:
        for name, inside, _ in members:
            path = os.path.join(temporary, inside)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with archive.open(name) as source, open(path, "xb") as target:
                # In small pieces: what is written at once, the page cache maps at once, and then it counts as used.
                shutil.copyfileobj(source, target, 1 << 14)
        compile_tree(temporary, tree)  # later starts, and users who may not write here, find everything compiled
        open(os.path.join(temporary, ".lock"), "x").close()
        # Data before the name: a power cut leaves a tmp folder or a whole tree.
        os.sync()
        os.rename(temporary, tree)
        descriptor = os.open(root, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def discard(root, path):
    """Remove a tree. It loses its name first: a power cut must not leave half a tree under the name of a whole one."""
    doomed = tempfile.mkdtemp(prefix="tmp.", dir=root)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean(root, tree):
    """Remove what a power cut left and the trees of other releases, except one that a process runs from."""
    for name in os.listdir(root):
        path = os.path.join(root, name)
        if path == tree or not os.path.isdir(path) or os.path.islink(path):
            continue
        if name.startswith("tmp."):
            shutil.rmtree(path, ignore_errors=True)
        elif name.startswith("tree."):
            descriptor = hold(path, exclusively=True)
            if descriptor is not None:
                discard(root, path)
                os.close(descriptor)


def main():
    # shiv's variables could name another entry point or folder: they are not obeyed, nor handed on.
    for name in [name for name in os.environ if name.startswith("SHIV_")]:
        del os.environ[name]
    mask = os.umask(0o022)
    try:
        root = cache_root()
        with zipfile.ZipFile(ARCHIVE) as archive:
            tree = os.path.join(root, "tree." + archive.read("build-id").decode() + "." + TAG)
            members, lock = members_of(archive), None
            doubted = os.environ.pop(DOUBTED, "") == tree
            if os.path.isdir(tree):
                check_folder(tree)
                lock = None if doubted else use(members, tree)
            if lock is None:
                with open(os.path.join(root, ".lock"), "a") as gate:
                    fcntl.flock(gate, fcntl.LOCK_EX)
                    clean(root, tree)
                    if os.path.isdir(tree):
                        lock = None if doubted else use(members, tree)
                        if lock is None:
                            discard(root, tree)
                    if lock is None:
                        unpack(archive, members, root, tree)
                        lock = use(members, tree)
                    check_folder(tree)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            refuse("no room to unpack the program; free some, or name another folder in MICROAUTHD_CACHE")
        refuse("the program cannot be unpacked: %s" % error)
    except Exception as error:  # of zipfile and zlib, whose kinds are many
        refuse("the program cannot be unpacked, this file is damaged, copy it anew: %s" % error)
    finally:
        os.umask(mask)
    if lock is None:
        refuse("the program in %s does not stay whole: this file is damaged, or somebody cleans that folder" % tree)
    os.set_inheritable(lock, True)  # held by every process that runs from the tree
    sys.path[0] = tree
    try:
        from appliance.commands import main as run
    except Exception as error:
        if "failed to map segment" in str(error):
            refuse("%s is on a file system mounted noexec; name another folder in MICROAUTHD_CACHE" % tree)
        if doubted:
            raise
        # A bit of it flipped, most likely: once more from the archive.
        sys.stderr.write("microauthd: the unpacked program does not load (%r); unpacking it again\n" % error)
        os.environ[DOUBTED] = tree
        os.close(lock)
        os.execv(sys.executable, sys.orig_argv)
    sys.exit(run())


main()
