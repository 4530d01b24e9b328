"""Checks a ledger, or a proof of one record, by what docs/audit.md says of their form, and nothing of the gateway's.

    verify_ledger.py LEDGER [--public-key FILE] [--checkpoint FILE]
    verify_ledger.py --proof FILE --public-key FILE

Written for people who read it, not for speed: the standard library is all that it needs.
"""

import argparse
import base64
import hashlib
import json
import pathlib
import struct
import sys

SEGMENT_HEAD = 512
FRAME_MIN, FRAME_MAX = 56, 32 << 20
LOGS = ("admin", "predictions", "feedback")
ERASURE, RETENTION = 6, 7


class Fault(Exception):
    """Something is not as it has to be."""


def need(condition, where, what):
    if not condition:
        raise Fault(f"{where}: {what}")


# CRC-32C (Castagnoli), reflected.
TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    TABLE.append(byte)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def sha256(*parts):
    return hashlib.sha256(b"".join(parts)).digest()


# Ed25519, as RFC 8032 section 5.1 and its appendix have it.
P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
ROOT = pow(2, (P - 1) // 4, P)


def add(a, b):
    one, two = (a[1] - a[0]) * (b[1] - b[0]) % P, (a[1] + a[0]) * (b[1] + b[0]) % P
    three, four = 2 * a[3] * b[3] * D % P, 2 * a[2] * b[2] % P
    e, f, g, h = two - one, four - three, four + three, two + one
    return (e * f, g * h, f * g, e * h)


def times(scalar, point):
    result = (0, 1, 1, 0)
    while scalar:
        if scalar & 1:
            result = add(result, point)
        point = add(point, point)
        scalar >>= 1
    return result


def point(data):
    """The point that 32 bytes say, or None."""
    y = int.from_bytes(data, "little")
    sign, y = y >> 255, y & ((1 << 255) - 1)
    if y >= P:
        return None
    squared = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    x = pow(squared, (P + 3) // 8, P)
    if (x * x - squared) % P:
        x = x * ROOT % P
    if (x * x - squared) % P or (x == 0 and sign):
        return None
    x = P - x if x & 1 != sign else x
    return (x, y, 1, x * y % P)


BASE = point((4 * pow(5, P - 2, P) % P).to_bytes(32, "little"))


def ed25519(public, message, signature):
    a, r = point(public), point(signature[:32])
    s = int.from_bytes(signature[32:], "little")
    if len(signature) != 64 or a is None or r is None or s >= ORDER:
        return False
    h = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % ORDER
    left, right = times(s, BASE), add(r, times(h, a))
    return all((left[at] * right[2] - right[at] * left[2]) % P == 0 for at in (0, 1))


class Key:
    """A verifier key: `name+id+base64(1 ‖ Ed25519 key)`."""

    def __init__(self, text):
        self.text = text
        self.name, self.id, encoded = text.split("+", 2)
        data = base64.b64decode(encoded, validate=True)
        need(len(data) == 33 and data[0] == 1, text, "not an Ed25519 key")
        self.public = data[1:]
        wanted = sha256(self.name.encode(), b"\n", data)[:4].hex()
        need(self.id == wanted, text, "the id is not that of the key")


def read_keys(path):
    lines = (line.strip() for line in path.read_text().splitlines())
    return [Key(line) for line in lines if line and not line.startswith("#")]


class Note:
    """A checkpoint and its signatures."""

    def __init__(self, text, where):
        self.where = where
        signed, _, signatures = text.partition("\n\n")
        self.text = signed + "\n"
        lines = signed.split("\n")
        need(len(lines) >= 3, where, "not a checkpoint")
        self.origin, self.size, self.root = lines[0], int(lines[1]), base64.b64decode(lines[2], validate=True)
        need(str(self.size) == lines[1] and len(self.root) == 32, where, "not a checkpoint")
        self.extensions = dict(line.partition(" ")[::2] for line in lines[3:])
        self.signatures = []
        for line in signatures.splitlines():
            dash, name, encoded = line.split(" ")
            data = base64.b64decode(encoded, validate=True)
            need(dash == "\u2014" and len(data) == 68, where, "not a signature")
            self.signatures.append((name, data[:4].hex(), data[4:]))
        need(self.signatures, where, "not signed")

    def signed_by(self, key):
        found = [data for name, id_, data in self.signatures if (name, id_) == (key.name, key.id)]
        for signature in found:
            need(ed25519(key.public, self.text.encode(), signature), self.where, f"a wrong signature by {key.id}")
        return bool(found)

    def next_key(self):
        return Key(self.extensions["next-key"]) if "next-key" in self.extensions else None


def read_notes(path):
    """Every note of a file; each has an empty line behind it. A torn end is left out."""
    notes, lines, blank = [], [], 0
    for line in path.read_text().split("\n")[:-1]:
        lines.append(line)
        blank += line == ""
        if blank == 2:
            notes.append(Note("\n".join(lines[:-1]) + "\n", path))
            lines, blank = [], 0
    return notes


def node(left, right):
    return sha256(b"\x01", left, right)


class Tree:
    """Leaves so far: root by RFC 6962, and the hashes that the files of the tree have."""

    def __init__(self):
        self.peaks, self.size, self.levels = [], 0, {}

    def push(self, leaf):
        hash_, height, bits = leaf, 0, self.size
        self.levels.setdefault(0, []).append(hash_)
        while bits & 1:
            hash_, height, bits = node(self.peaks.pop(), hash_), height + 1, bits >> 1
            if height % 8 == 0:
                self.levels.setdefault(height // 8, []).append(hash_)
        self.peaks.append(hash_)
        self.size += 1

    def root(self):
        if not self.peaks:
            return sha256()
        root = self.peaks[-1]
        for peak in reversed(self.peaks[:-1]):
            root = node(peak, root)
        return root


def fields(data):
    """Fields of a protobuf message: number and value."""

    def varint(at):
        value, shift = 0, 0
        while True:
            value |= (data[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if not data[at - 1] & 0x80:
                return value, at

    at = 0
    while at < len(data):
        tag, at = varint(at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = varint(at)
        elif kind == 1:
            value, at = data[at : at + 8], at + 8
        elif kind == 2:
            length, at = varint(at)
            value, at = data[at : at + length], at + length
        else:
            raise Fault(f"a field of kind {kind}")
        yield number, value


class Frame:
    def __init__(self, data, where):
        self.form, self.head_len = data[8], struct.unpack_from("<I", data, 12)[0]
        need(data[8] in (0, 1) and not any(data[9:12]), where, "a form that is not known")
        need(self.head_len <= len(data) - FRAME_MIN, where, "a head longer than its frame")
        self.head = data[16 : 16 + self.head_len]
        self.salt = data[16 + self.head_len : 48 + self.head_len]
        self.payload = data[48 + self.head_len : -8]
        self.seq = struct.unpack_from("<Q", data, len(data) - 8)[0]
        self.erased = self.form == 1
        need(not (self.erased and self.payload), where, "an erased frame with a payload")

    def leaf(self):
        commitment = self.salt if self.erased else sha256(self.salt, self.payload)
        return sha256(b"\x00", struct.pack("<Q", self.seq), self.head, commitment)


def read_head(data, path):
    head = data[:SEGMENT_HEAD]
    need(len(head) == SEGMENT_HEAD and head[:8] == b"TGLEDGR1", path, "not a segment")
    mark = struct.unpack_from("<I", head, 8)[0]
    need(path.suffix != ".seg" or mark in (0, len(data)), path, f"{len(data)} bytes, sealed with {mark}")
    need(struct.unpack_from("<I", head, 12)[0] == crc32c(head[16:]), path, "the head's checksum is wrong")
    name = head[41 : 41 + head[40]].decode()
    return name, head[32:40].hex(), struct.unpack_from("<Q", head, 16)[0]


def frames(data, path):
    at, sealed = SEGMENT_HEAD, path.suffix == ".seg"
    while at < len(data):
        where = f"{path} at byte {at}"
        length, crc = struct.unpack_from("<II", data, at) if at + 8 <= len(data) else (0, 1)
        whole = FRAME_MIN <= 8 + length <= FRAME_MAX and at + 8 + length <= len(data)
        if not whole or crc32c(data[at + 8 : at + 8 + length]) != crc:
            # The end of a segment that is still written may be half a frame, and zeros.
            need(not sealed, where, "no whole frame")
            return
        yield Frame(data[at : at + 8 + length], where), where
        at += 8 + length


def explained(admin):
    """What the log of changes says is missing in the others: `{log: ([[from, to]], below)}`."""
    found = {}
    for path in sorted(admin.glob("segments/*.*")):
        for frame, _ in frames(path.read_bytes(), path):
            kind = next((value for number, value in fields(frame.head) if number == 1), 0)
            if kind not in (ERASURE, RETENTION) or frame.erased:
                continue
            body = json.loads(next(value for number, value in fields(frame.payload) if number == 5))
            ranges, below = found.get(body["log"], ([], 0))
            found[body["log"]] = (ranges + body.get("records", []), max(below, body.get("removed_below") or 0))
    return found


def verify_log(log, published, given, anchors, missing):
    tree, writer, erased = Tree(), None, 0
    ranges, below = missing
    notes = read_notes(log / "checkpoints") if (log / "checkpoints").exists() else []
    if (log / "checkpoint").exists():
        last = Note((log / "checkpoint").read_text(), log / "checkpoint")
        if not notes or notes[-1].text != last.text:
            notes.append(last)
    roots = {}
    segments = sorted(path for path in log.glob("segments/*") if path.suffix in (".seg", ".open"))
    for path in segments:
        data = path.read_bytes()
        name, of, first = read_head(data, path)
        need(name == log.name or log.name not in LOGS, path, f"a segment of {name}")
        need(writer in (None, of), path, f"written by {of}")
        if writer is None and first:
            need(first <= below, path, f"no record before {first}, and none says why")
            leaves = (log / "tree" / "0").read_bytes()
            for at in range(first):
                tree.push(leaves[at * 32 : at * 32 + 32])
                roots[tree.size] = tree.root()
        writer = of
        need(first == tree.size and path.stem == f"{first:020}", path, f"begins with {first}, not {tree.size}")
        for frame, where in frames(data, path):
            need(frame.seq == tree.size, where, f"number {frame.seq} where {tree.size} is due")
            if frame.erased:
                erased += 1
                known = any(low <= frame.seq < high for low, high in ranges)
                need(known, where, f"record {frame.seq} has no payload, and no record says why")
            tree.push(frame.leaf())
            roots[tree.size] = tree.root()
    origin = f"tidegate/{writer}/{log.name}"
    for level, hashes in tree.levels.items():
        path = log / "tree" / str(level)
        if path.exists():
            found = path.read_bytes()
            need(b"".join(hashes).startswith(found[: len(found) // 32 * 32]), path, "not the records' hashes")
    active, before, seen = None, 0, not given or not tree.size
    for note in notes:
        need(note.origin == origin, note.where, f"a checkpoint of {note.origin}")
        need(note.extensions.get("after") == str(before), note.where, f"does not follow that of size {before}")
        need(note.size in roots, note.where, f"says {note.size} records, there are {tree.size}")
        need(roots[note.size] == note.root, note.where, f"another root of {note.size} records")
        candidates = [active] if active else [key for key in published + given if key.name == origin]
        by = next((key for key in candidates if note.signed_by(key)), None)
        need(by, note.where, "signed by no key that is known")
        seen = seen or by.text in [key.text for key in given]
        following = note.next_key()
        if following:
            need(note.signed_by(following), note.where, "not signed by the key that it names")
            seen = seen or following.text in [key.text for key in given]
        active, before = following or by, note.size
    need(seen, log, "no checkpoint is signed by a key that was given")
    for note in anchors:
        if note.origin == origin:
            need(any(note.signed_by(key) for key in published + given), note.where, "signed by nobody known")
            need(roots.get(note.size) == note.root, note.where, f"the log has not these {note.size} records")
    return {"records": tree.size, "erased": erased, "checkpoints": len(notes), "signed": before, "segments": len(segments)}


def verify_ledger(ledger, given, anchors):
    keys = [key for path in sorted((ledger / "keys").glob("*.pub")) for key in read_keys(path)]
    missing = explained(ledger / "admin")
    logs = [ledger / name for name in LOGS if any((ledger / name).glob("segments/*"))]
    need(logs, ledger, "no log in it")
    found = {}
    for log in logs:
        mine = [key for key in given if key.name.endswith(f"/{log.name}")]
        found[log.name] = verify_log(log, keys, mine, anchors, missing.get(log.name, ([], 0)))
    return found


def verify_proof(path, given):
    proof = json.loads(path.read_text())
    data = {name: base64.b64decode(proof[name]) for name in ("head", "commitment")}
    if "payload" in proof:
        salted = sha256(base64.b64decode(proof["salt"]), base64.b64decode(proof["payload"]))
        need(salted == data["commitment"], path, "the payload is not the one that was recorded")
    leaf = sha256(b"\x00", struct.pack("<Q", proof["seq"]), data["head"], data["commitment"])
    note = Note(proof["checkpoint"], path)
    need(note.origin == proof["origin"], path, f"a checkpoint of {note.origin}")
    # RFC 9162, section 2.1.3.2.
    at, last, root = proof["seq"], note.size - 1, leaf
    need(at <= last, path, "not in the tree")
    for step in map(base64.b64decode, proof["path"]):
        need(last, path, "a path that is too long")
        if at & 1 or at == last:
            root = node(step, root)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            root = node(root, step)
        at, last = at >> 1, last >> 1
    need(last == 0 and root == note.root, path, "not in the tree of the checkpoint")
    keys = list(given)
    for text in proof.get("handovers", []):
        handover = Note(text, path)
        if handover.origin == note.origin and any(handover.signed_by(key) for key in keys):
            following = handover.next_key()
            need(handover.signed_by(following), path, "a handover that the new key did not sign")
            keys.append(following)
    need(any(note.signed_by(key) for key in keys), path, "signed by no key that is known")
    return {"log": note.origin, "seq": proof["seq"], "records": note.size}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("ledger", type=pathlib.Path, nargs="?")
    parser.add_argument("--public-key", type=pathlib.Path, action="append", default=[])
    parser.add_argument("--checkpoint", type=pathlib.Path, action="append", default=[])
    parser.add_argument("--proof", type=pathlib.Path)
    arguments = parser.parse_args()
    try:
        given = [key for path in arguments.public_key for key in read_keys(path)]
        if arguments.proof:
            print(json.dumps(verify_proof(arguments.proof, given)))
        elif arguments.ledger:
            anchors = [note for path in arguments.checkpoint for note in read_notes(path)]
            print(json.dumps(verify_ledger(arguments.ledger, given, anchors)))
        else:
            parser.error("a ledger or a proof?")
    except (Fault, ValueError, KeyError, OSError) as fault:
        print(f"fault: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
