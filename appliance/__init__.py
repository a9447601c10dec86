"""What stands around the server, and what it stands on. Every arrow of an import runs down.

    commands                            main(): serve, setup, options, backup, keys, …
    service                             making it a service of the machine, and taking that away
    help                                the pages of the manual on a terminal and for man, completion
    claim                               the set-up of a box without a keyboard, on a page of the network
    oobe                                the wizard of the first start
    upgrade                             a new release in place of this one, or back
    recovery                            the set-up journal, restore, recovery, reset
    processes                           what is settled before the first fork, a server process, the supervisor
    machine                             what the routes of ADMIN get done at the machine
    status                              how the box is, and what needs attention
    upkeep, backup                      purging, key states, the clock's thread; one file that restores a box
    authority                           the box's own CA, and the certificate that it makes and renews
    figures                             what metrics say of the machine, and figures over time
    release                             which release an archive is of, and what may replace it
    rings                               the key rings: what signs, rotation, the revocation of a stolen key
    ────────────────────────────────────────────────────────────────────────────────────────────────
    microauthd                          the server: one Bottle module with every rule and every route
    ────────────────────────────────────────────────────────────────────────────────────────────────
    base.openapi                        what a route is, and the description that its declaration makes
    base.objects                        what each object of the wire looks like
    base.pages                          the templates of what people see, their languages and style
    base.store                          rows, MIGRATIONS, every SQL statement
    base.database                       the engine under the store
    base.wal                            the write-ahead log, and the mark of what in it was acknowledged
    base.wire                           the two servers: whole requests, limits, deadlines, TLS
    base.tls                            the certificates that the ports serve
    base.settings                       Options and what loads, describes and writes them
    base.keys, base.hashing             key files and signatures; Argon2id and the bound on it
    base.clock, base.log, base.files    the time, the log, files that survive a power cut
    base.headers                        the security headers of every response
    base.peers                          which addresses count as one peer
    base.metrics                        the declaration of every metric, counters, and their text
    base.shared                         numbers in memory that all processes share

`base` knows nothing of OAuth; `microauthd` knows nothing of sockets, processes, SQL or the command line;
what stands above decides nothing about who may do what.
"""

import resource
import sys

LEAST_TO_LOAD = (  # what build/main.py demands before it unpacks the archive
    (resource.RLIMIT_NOFILE, "open files (ulimit -n)", 16, "16"),
    (resource.RLIMIT_AS, "address space (ulimit -v)", 96 << 20, "96 MB"),
)


def check_loadable():
    """Exit with a sentence if the libraries cannot be loaded within the limits of this process. getrlimit(2)

    Called here, where every way into the program comes by before it loads them: it would end in a traceback of one.
    """
    for limit, name, least, needed in LEAST_TO_LOAD:
        allowed = resource.getrlimit(limit)[0]
        if allowed != resource.RLIM_INFINITY and allowed < least:
            sys.exit(f"microauthd: the limit of {name} is too low: the program needs {needed}")


check_loadable()
