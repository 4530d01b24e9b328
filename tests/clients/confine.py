"""Runs a program as a container runtime would run the image: as PID 1 over a read-only root, and confined.

    python confine.py ORDER.json

The order: `root` (folder that becomes /), `writable` (paths below it that stay writable), `uid`, `argv`, `env`,
`seccomp` (a profile in the runtimes' JSON format, or null), `pid_file`. The exit code is the program's; a signal's is
128 + its number. Needs user namespaces, and libseccomp for a profile.
"""

import ctypes
import errno
import json
import os
import platform
import signal
import sys

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x08000000, 0x10000000, 0x20000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
PR_SET_PDEATHSIG, PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 23, 24, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
CAPABILITY_VERSION_3 = 0x20080522
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}[platform.machine()]
SCMP_ACT = {"SCMP_ACT_ALLOW": 0x7FFF0000, "SCMP_ACT_ERRNO": 0x00050000, "SCMP_ACT_KILL_PROCESS": 0x80000000}
SCMP_CMP = {"SCMP_CMP_NE": 1, "SCMP_CMP_LT": 2, "SCMP_CMP_LE": 3, "SCMP_CMP_EQ": 4, "SCMP_CMP_GE": 5, "SCMP_CMP_GT": 6}
SCMP_CMP["SCMP_CMP_MASKED_EQ"] = 7

libc = ctypes.CDLL(None, use_errno=True)
libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]


def call(name, result):
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def mount(source, target, kind, flags):
    source, kind = (text.encode() if text else None for text in (source, kind))
    call(f"mount {target}", libc.mount(source, target.encode(), kind, flags, None))


def locked_flags(path):
    """What a mount must keep, because whoever mounted it outside said so; statvfs has the same bits."""
    return os.statvfs(path).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)


def build_root(order):
    root = order["root"]
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount(root, root, None, MS_BIND | MS_REC)
    for path in order["writable"]:
        mount(root + path, root + path, None, MS_BIND)
    for device in ("null", "zero", "urandom"):
        mount(f"/dev/{device}", f"{root}/dev/{device}", None, MS_BIND)
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("none", root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | locked_flags(root))
    os.chroot(root)
    os.chdir("/")


def drop_everything():
    """No capability now, later or by exec."""
    call("ambient", libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) == 1:
            call("bounding", libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0))
    call("no_new_privs", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    call("capset", libc.syscall(SYS_CAPSET, header, nothing))


class ArgCmp(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def action(rule, name, errno_name):
    value = SCMP_ACT[rule[name]]
    return value | rule.get(errno_name, errno.EPERM) if rule[name] == "SCMP_ACT_ERRNO" else value


def seccomp(profile):
    """Makes the filter now, while the library can be found; returns what puts it into force."""
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_load.argtypes = [ctypes.c_void_p]
    library.seccomp_rule_add_array.argtypes = [
        *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(ArgCmp)),
    ]
    context = library.seccomp_init(action(profile, "defaultAction", "defaultErrnoRet"))
    for rule in profile["syscalls"]:
        compared = rule.get("args", [])
        terms = (ArgCmp * max(len(compared), 1))(
            *(ArgCmp(each["index"], SCMP_CMP[each["op"]], each["value"], each.get("valueTwo", 0)) for each in compared)
        )
        for name in rule["names"]:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number < 0:
                continue  # Not on this architecture, or newer than the library: runtimes skip it too.
            code = library.seccomp_rule_add_array(
                context, action(rule, "action", "errnoRet"), number, len(compared), terms
            )
            if code:
                raise OSError(-code, f"seccomp rule for {name}: {os.strerror(-code)}")

    def load():
        code = library.seccomp_load(context)
        if code:
            raise OSError(-code, f"seccomp: {os.strerror(-code)}")

    return load


def become(order):
    call("pdeathsig", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    filtered = seccomp(order["seccomp"]) if order["seccomp"] else None
    build_root(order)
    # What Python inherited is not for the program.
    os.closerange(3, 4096)
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    drop_everything()
    if filtered:
        filtered()
    os.execve(order["argv"][0], order["argv"], order["env"])


def main():
    with open(sys.argv[1]) as file:
        order = json.load(file)
    user, group = os.geteuid(), os.getegid()
    call("unshare", libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{order['uid']} {user} 1"),
        ("gid_map", f"{order['uid']} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    child = os.fork()
    if child == 0:
        try:
            become(order)
        except BaseException as error:
            os.write(2, f"confine: {error!r}\n".encode())
        os._exit(125)
    with open(order["pid_file"], "w") as file:
        file.write(str(child))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
