//! Bytes of the log: a segment's head, and the frames after it.
//!
//! ```text
//! segment   head (512 bytes) ┬ frame ┬ frame ┬ … ┬ zeros to the end of what is allocated
//! frame     len u32 │ crc u32 │ form u8 │ 0 u8×3 │ head_len u32 │ head │ salt 32 │ payload │ seq u64
//!           len: bytes after the first eight · crc: CRC-32C of those · numbers little endian
//! leaf      SHA-256(0x00 ‖ seq ‖ head ‖ commitment)     commitment = SHA-256(salt ‖ payload)
//! ```
//!
//! `seq` stands last so that all before it can be summed before anybody knows it: a number is taken
//! under the log's lock, and what is done there is little. An erased frame has its commitment where
//! the salt was, and no payload: its leaf stays what it was, and nobody can guess what it held.
//!
//! Invariants:
//! - Reading never panics and never allocates more than the bytes that are there.
//! - A `len` of 0 is the end; no frame is that short.

use sha2::{Digest as _, Sha256};

/// First bytes of every segment.
pub const MAGIC: &[u8; 8] = b"TGLEDGR1";
/// Bytes of a segment's head.
pub const SEGMENT_HEAD_BYTES: usize = 512;
/// Where the mark stands in it: four bytes that the checksum leaves out, since they change.
pub(super) const MARK: std::ops::Range<usize> = 8..12;
/// Largest frame, all of it.
pub const FRAME_BYTES_MAX: usize = 32 << 20;
/// `len` and `crc`.
pub(super) const PRELUDE: usize = 8;
/// Form, padding and the head's length.
const FORE: usize = 8;
const SALT: usize = 32;
const SEQ: usize = 8;
/// Records that can have been in what was destroyed before a whole frame: a segment of small ones.
const SKIPPED_MAX: u64 = 1 << 22;
/// A frame of an empty head and an empty payload.
pub(super) const FRAME_BYTES_MIN: usize = PRELUDE + FORE + SALT + SEQ;
/// Longest name of a log.
const NAME_BYTES_MAX: usize = 32;

/// Whoever writes a log: one gateway's state folder, for as long as that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WriterId(pub [u8; 8]);

impl std::fmt::Display for WriterId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What is said once for a whole segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentHead {
    /// `predictions`, `admin` or `feedback`.
    pub log: String,
    pub writer: WriterId,
    pub first_seq: u64,
    /// Nanoseconds since 1970.
    pub created_ns: u64,
}

impl SegmentHead {
    pub fn encode(&self) -> [u8; SEGMENT_HEAD_BYTES] {
        let mut bytes = [0; SEGMENT_HEAD_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[16..24].copy_from_slice(&self.first_seq.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.created_ns.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.writer.0);
        let name = &self.log.as_bytes()[..self.log.len().min(NAME_BYTES_MAX)];
        bytes[40] = u8::try_from(name.len()).unwrap_or(0);
        bytes[41..41 + name.len()].copy_from_slice(name);
        let crc = crc32c::crc32c(&bytes[16..]);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// # Errors
    /// A text that says what is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let Some(bytes) = bytes.get(..SEGMENT_HEAD_BYTES) else {
            return Err("shorter than a segment's head");
        };
        if &bytes[..8] != MAGIC {
            return Err("not a segment of a ledger");
        }
        if u32_at(bytes, 12) != crc32c::crc32c(&bytes[16..]) {
            return Err("the segment's head does not match its checksum");
        }
        let len = usize::from(bytes[40]).min(NAME_BYTES_MAX);
        let name = std::str::from_utf8(&bytes[41..41 + len]);
        let mut writer = [0; 8];
        writer.copy_from_slice(&bytes[32..40]);
        Ok(Self {
            log: name.map_err(|_| "the log's name is no text")?.to_owned(),
            writer: WriterId(writer),
            first_seq: u64_at(bytes, 16),
            created_ns: u64_at(bytes, 24),
        })
    }
}

/// What a segment's mark says, if anything: of a sealed one its length, of an open one a length up to
/// which all of it is on the disk.
pub(super) fn mark(head: &[u8]) -> Option<u64> {
    Some(u64::from(u32_at(head, MARK.start))).filter(|mark| *mark > 0)
}

/// The whole frame at the start of `bytes` if there is one, of a record after `next_seq` and no
/// later than the bytes can hold. Looks at few bytes where there is none.
pub(super) fn later(bytes: &[u8], next_seq: u64) -> Option<Frame<'_>> {
    let total = PRELUDE + u32_at(bytes, 0) as usize;
    if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&total) || bytes.len() < total {
        return None;
    }
    let seq_max = next_seq.saturating_add((bytes.len() / FRAME_BYTES_MIN) as u64 + SKIPPED_MAX);
    if !(next_seq..=seq_max).contains(&u64_at(bytes, total - SEQ)) {
        return None;
    }
    match parse(bytes) {
        Parsed::Frame(frame) => Some(frame),
        _ => None,
    }
}

/// Bytes of the frame that begins here, as its length says; `None` when no frame is that long.
pub(super) fn total(bytes: &[u8]) -> Option<usize> {
    let total = PRELUDE + u32_at(bytes, 0) as usize;
    let is_one = bytes.len() >= PRELUDE && (FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&total);
    is_one.then_some(total)
}

/// Whether a record's payload is still there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Whole,
    Erased,
}

/// One record as it lies in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    pub seq: u64,
    pub form: Form,
    /// A `Head` of `proto/ledger.proto`.
    pub head: &'a [u8],
    /// The salt, or once the payload is erased its commitment.
    pub salt: &'a [u8; SALT],
    /// A `Payload`; empty when it is erased.
    pub payload: &'a [u8],
    /// The whole of it.
    pub bytes: &'a [u8],
}

/// What stands at some place of a segment.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed<'a> {
    Frame(Frame<'a>),
    /// Nothing was written here yet.
    End,
    /// As much as is there may be the start of a frame of so many bytes.
    Short {
        needed: usize,
    },
    Bad(&'static str),
}

/// Reads the frame at the start of `bytes`.
pub fn parse(bytes: &[u8]) -> Parsed<'_> {
    let Some(prelude) = bytes.get(..PRELUDE) else {
        return match bytes.iter().all(|byte| *byte == 0) {
            true if bytes.is_empty() => Parsed::End,
            _ => Parsed::Short { needed: PRELUDE },
        };
    };
    let len = u32_at(prelude, 0) as usize;
    if len == 0 {
        return match u32_at(prelude, 4) {
            0 => Parsed::End,
            _ => Parsed::Bad("no length before a checksum"),
        };
    }
    let total = PRELUDE + len;
    if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&total) {
        return Parsed::Bad("a length that no frame has");
    }
    let Some(frame) = bytes.get(..total) else { return Parsed::Short { needed: total } };
    if crc32c::crc32c(&frame[PRELUDE..]) != u32_at(prelude, 4) {
        return Parsed::Bad("the frame does not match its checksum");
    }
    match split(frame) {
        Ok(frame) => Parsed::Frame(frame),
        Err(why) => Parsed::Bad(why),
    }
}

/// The parts of a frame whose length and checksum are right, of exactly its bytes.
pub(super) fn split(frame: &[u8]) -> Result<Frame<'_>, &'static str> {
    let form = match frame[PRELUDE..PRELUDE + 4] {
        [0, 0, 0, 0] => Form::Whole,
        [1, 0, 0, 0] => Form::Erased,
        _ => return Err("a form of frame that is not known"),
    };
    let body = &frame[PRELUDE + FORE..frame.len() - SEQ];
    let head_len = u32_at(frame, PRELUDE + 4) as usize;
    if head_len > body.len() - SALT {
        return Err("a head longer than its frame");
    }
    let (head, rest) = body.split_at(head_len);
    let (salt, payload) = rest.split_first_chunk().ok_or("a frame without a salt")?;
    if form == Form::Erased && !payload.is_empty() {
        return Err("an erased frame with a payload");
    }
    let seq = u64_at(frame, frame.len() - SEQ);
    Ok(Frame { seq, form, head, salt, payload, bytes: frame })
}

impl Frame<'_> {
    /// The hash that the log commits to instead of the payload.
    pub fn commitment(&self) -> [u8; 32] {
        match self.form {
            Form::Erased => *self.salt,
            Form::Whole => {
                Sha256::new().chain_update(self.salt).chain_update(self.payload).finalize().into()
            }
        }
    }

    /// Hash of this record in the log's Merkle tree (RFC 6962, section 2.1).
    pub fn leaf(&self) -> [u8; 32] {
        let hash = Sha256::new()
            .chain_update([0])
            .chain_update(self.seq.to_le_bytes())
            .chain_update(self.head);
        hash.chain_update(self.commitment()).finalize().into()
    }

    /// The same record without its payload.
    pub fn erased(&self) -> Vec<u8> {
        let mut draft = Draft::default();
        draft.start();
        draft.bytes.extend_from_slice(self.head);
        draft.body(Form::Erased, &self.commitment());
        let mut bytes = Vec::new();
        draft.seal(self.seq, &mut bytes);
        bytes
    }
}

/// A frame in the making, without a number. Kept and used again: what it allocated stays.
#[derive(Debug, Default)]
pub struct Draft {
    bytes: Vec<u8>,
    crc: u32,
}

impl Draft {
    /// Begins a frame: what was there goes, the head is appended to [`Draft::buffer`] next.
    pub fn start(&mut self) {
        self.bytes.clear();
        self.bytes.resize(FORE, 0);
    }

    /// Where the head, and after [`Draft::body`] the payload, is appended.
    pub fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Ends the head and begins the payload.
    pub fn body(&mut self, form: Form, salt: &[u8; SALT]) {
        let len = u32::try_from(self.bytes.len() - FORE).unwrap_or(u32::MAX);
        self.bytes[0] = u8::from(form == Form::Erased);
        self.bytes[4..FORE].copy_from_slice(&len.to_le_bytes());
        self.bytes.extend_from_slice(salt);
    }

    /// Ends the payload: sums up all but the number.
    pub fn finish(&mut self) {
        self.crc = crc32c::crc32c(&self.bytes);
    }

    /// Bytes of the whole frame.
    pub fn len(&self) -> usize {
        PRELUDE + self.bytes.len() + SEQ
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Gives a finished frame its number and appends it to `out`.
    pub fn put(&self, seq: u64, out: &mut Vec<u8>) {
        let seq = seq.to_le_bytes();
        let len = u32::try_from(self.bytes.len() + SEQ).unwrap_or(u32::MAX);
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(&crc32c::crc32c_append(self.crc, &seq).to_le_bytes());
        out.extend_from_slice(&self.bytes);
        out.extend_from_slice(&seq);
    }

    fn seal(mut self, seq: u64, out: &mut Vec<u8>) {
        self.finish();
        self.put(seq, out);
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |part| u32::from_le_bytes(*part))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |part| u64::from_le_bytes(*part))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(seq: u64, head: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut draft = Draft::default();
        draft.start();
        draft.buffer().extend_from_slice(head);
        draft.body(Form::Whole, &[7; 32]);
        draft.buffer().extend_from_slice(payload);
        let mut bytes = Vec::new();
        draft.seal(seq, &mut bytes);
        bytes
    }

    #[test]
    fn a_frame_comes_back() {
        let bytes = frame(42, b"head", b"payload");
        let Parsed::Frame(read) = parse(&bytes) else { panic!("{:?}", parse(&bytes)) };
        assert_eq!((read.seq, read.form), (42, Form::Whole));
        assert_eq!((read.head, read.payload), (&b"head"[..], &b"payload"[..]));
        assert_eq!(read.salt, &[7; 32]);
        assert_eq!(read.bytes, bytes);
    }

    #[test]
    fn an_erased_frame_has_the_same_leaf() {
        let bytes = frame(9, b"head", b"secret");
        let Parsed::Frame(whole) = parse(&bytes) else { panic!() };
        let erased = whole.erased();
        let Parsed::Frame(erased) = parse(&erased) else { panic!() };
        assert_eq!((erased.form, erased.payload), (Form::Erased, &b""[..]));
        assert_eq!(erased.leaf(), whole.leaf());
    }

    #[test]
    fn every_flipped_bit_shows() {
        let bytes = frame(9, b"head", b"secret");
        for at in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[at / 8] ^= 1 << (at % 8);
            assert!(!matches!(parse(&bad), Parsed::Frame(_)), "bit {at}");
        }
    }

    #[test]
    fn every_cut_is_short() {
        let bytes = frame(9, b"head", b"secret");
        for len in 1..bytes.len() {
            assert!(matches!(parse(&bytes[..len]), Parsed::Short { .. }), "{len}");
        }
        assert_eq!(parse(&[]), Parsed::End);
        assert_eq!(parse(&[0; 64]), Parsed::End);
    }

    #[test]
    fn a_segment_head_comes_back() {
        let head = SegmentHead {
            log: "predictions".to_owned(),
            writer: WriterId([1, 2, 3, 4, 5, 6, 7, 8]),
            first_seq: 77,
            created_ns: 88,
        };
        let mut bytes = head.encode();
        assert_eq!(SegmentHead::decode(&bytes), Ok(head));
        bytes[100] ^= 1;
        assert!(SegmentHead::decode(&bytes).is_err());
    }
}
