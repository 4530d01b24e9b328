//! A log of a test's own: records are put into it as the log puts them, one after the other.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::frame::{Draft, SegmentHead, WriterId};
use super::reader::{SEGMENTS, segment_path};
use super::record::{self, Head, Kind, Payload};

pub(crate) const WRITER: WriterId = WriterId([1, 2, 3, 4, 5, 6, 7, 8]);

pub(crate) struct TestLog {
    pub(crate) dir: PathBuf,
    pub(crate) name: &'static str,
    pub(crate) next: Arc<AtomicU64>,
    /// Of the segments that are begun from now on, in nanoseconds since 1970.
    pub(crate) created_ns: u64,
    open: Option<PathBuf>,
}

impl TestLog {
    pub(crate) fn new(ledger: &Path, name: &'static str) -> Self {
        let dir = ledger.join(name);
        std::fs::create_dir_all(dir.join(SEGMENTS)).unwrap();
        Self { dir, name, next: Arc::default(), created_ns: 1, open: None }
    }

    /// A prediction with its number as id.
    pub(crate) fn add(&mut self, error: &str) -> u64 {
        let seq = self.next.load(Ordering::SeqCst);
        let head = Head {
            kind: Kind::Prediction.into(),
            time_ns: 5,
            prediction_id: uuid::Uuid::from_u128(u128::from(seq) + 1).as_bytes().to_vec().into(),
            model: "iris".to_owned(),
            ..Head::default()
        };
        let payload = Payload { error: error.to_owned(), ..Payload::default() };
        self.put(&head, &payload)
    }

    pub(crate) fn put(&mut self, head: &Head, payload: &Payload) -> u64 {
        let seq = self.next.load(Ordering::SeqCst);
        let mut draft = Draft::default();
        let mut salt = [0x5a; 32];
        salt[..8].copy_from_slice(&seq.to_le_bytes());
        record::other(&mut draft, head, payload, &salt);
        let mut bytes = Vec::new();
        draft.put(seq, &mut bytes);
        let path = self.open.get_or_insert_with(|| {
            let path = segment_path(&self.dir, seq, false);
            let head = SegmentHead {
                log: self.name.to_owned(),
                writer: WRITER,
                first_seq: seq,
                created_ns: self.created_ns,
            };
            std::fs::write(&path, head.encode()).unwrap();
            path
        });
        let mut file = std::fs::OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(&bytes).unwrap();
        self.next.store(seq + 1, Ordering::SeqCst);
        seq
    }

    pub(crate) fn seal(&mut self) {
        if let Some(path) = self.open.take() {
            std::fs::rename(&path, path.with_extension("seg")).unwrap();
        }
    }
}
