//! Files over the network: part by part, taken up again where they broke off.
//!
//! Invariants:
//! - What is written has exactly the size that was expected, or is an error; it is on the disk for
//!   good when [`download`] returns.
//! - A part that breaks off is tried again after a growing, random pause, as long as there is
//!   progress; a server that never finishes anything is given up.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use tokio::io::{AsyncWriteExt, BufWriter};
use tokio::time::{Instant, timeout_at};

use super::{SourceError, io_error};

/// Bytes of one request. Tests have many parts without many bytes.
const PART_SIZE: u64 = if cfg!(test) { 256 << 10 } else { 16 << 20 };
/// Bytes that make an attempt count as progress.
const PROGRESS_MIN: u64 = 64 << 10;
/// Attempts in a row without progress.
const FRUITLESS_MAX: u32 = 4;
const WRITE_BUFFER: usize = 1 << 20;
/// Bytes a second that a part has to come with, after the grace.
const RATE_MIN: u64 = 64 << 10;
const GRACE: Duration = Duration::from_secs(30);

/// Pauses between attempts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backoff {
    pub(super) first: Duration,
    pub(super) longest: Duration,
}

impl Backoff {
    pub(super) const NETWORK: Self =
        Self { first: Duration::from_millis(200), longest: Duration::from_secs(10) };

    /// Pause before attempt `attempt`, from 1: between nothing and twice the one before.
    pub(super) async fn pause(self, attempt: u32) {
        let doubled = self.first.saturating_mul(1 << attempt.min(16));
        let ceiling = doubled.min(self.longest);
        // Without randomness every gateway comes back at the same moment; half is then a fair guess.
        let share =
            getrandom::u64().map_or(0.5, |random| (random >> 11) as f64 / (1_u64 << 53) as f64);
        tokio::time::sleep(ceiling.mul_f64(share)).await;
    }
}

/// Tries what may fail for a moment a few times.
pub(super) async fn again<T, F>(
    backoff: Backoff,
    mut attempt: impl FnMut() -> F,
) -> Result<T, SourceError>
where
    F: Future<Output = Result<T, SourceError>>,
{
    let mut tries = 1;
    loop {
        match attempt().await {
            Err(error) if error.is_transient() && tries < FRUITLESS_MAX => {
                tracing::debug!(%error, tries, "trying again");
                backoff.pause(tries).await;
                tries += 1;
            }
            done => return done,
        }
    }
}

/// Bytes from where they were asked for.
pub(super) struct Parts {
    pub(super) bytes: BoxStream<'static, Result<Bytes, SourceError>>,
    /// Where they have to end: a server that knows no ranges sends the whole file.
    pub(super) end: u64,
}

/// A file that can be read in parts.
pub(super) trait Ranges: Send + Sync {
    /// What it is, for messages.
    fn what(&self) -> String;

    /// The bytes of `range`, or from its start to the file's end; of the same file each time.
    fn open(&self, range: Range<u64>) -> BoxFuture<'_, Result<Parts, SourceError>>;
}

/// Writes a file of `size` bytes to `to`, which must not exist.
pub(super) async fn download(
    file: &dyn Ranges,
    size: u64,
    to: &Path,
    backoff: Backoff,
) -> Result<(), SourceError> {
    let error = io_error(to);
    let mut options = tokio::fs::OpenOptions::new();
    let made = options.write(true).create_new(true).mode(0o600).open(to).await;
    let mut out = BufWriter::with_capacity(WRITE_BUFFER, made.map_err(&error)?);
    let (mut at, mut fruitless) = (0, 0);
    let allowed = 4 * GRACE + Duration::from_secs(size / RATE_MIN);
    let until = Instant::now() + allowed;
    while at < size {
        let (before, end) = (at, size.min(at.saturating_add(PART_SIZE)));
        let done = part(file, end, size, &mut at, &mut out, to).await;
        if done.is_ok() || at - before >= PROGRESS_MIN {
            fruitless = 0;
        }
        match done {
            Ok(()) => {}
            Err(_) if Instant::now() >= until => {
                return Err(SourceError::Slow { what: file.what(), limit: allowed });
            }
            Err(error) if error.is_transient() && fruitless < FRUITLESS_MAX => {
                fruitless += 1;
                tracing::debug!(file = file.what(), at, size, %error, "taking a download up again");
                backoff.pause(fruitless).await;
            }
            Err(error) => return Err(error),
        }
    }
    out.flush().await.map_err(&error)?;
    out.get_ref().sync_all().await.map_err(&error)
}

async fn part(
    file: &dyn Ranges,
    wanted: u64,
    size: u64,
    at: &mut u64,
    out: &mut BufWriter<tokio::fs::File>,
    to: &Path,
) -> Result<(), SourceError> {
    let Parts { mut bytes, end } = file.open(*at..wanted).await?;
    let end = end.min(size);
    let allowed = GRACE + Duration::from_secs(end.saturating_sub(*at) / RATE_MIN);
    let until = Instant::now() + allowed;
    loop {
        let slow = |_| SourceError::Slow { what: file.what(), limit: allowed };
        let Some(chunk) = timeout_at(until, bytes.next()).await.map_err(slow)? else { break };
        let chunk = chunk?;
        if chunk.len() as u64 > end - *at {
            let reason = "it sent more than there should be".to_owned();
            return Err(SourceError::Answer { what: file.what(), reason });
        }
        out.write_all(&chunk).await.map_err(io_error(to))?;
        *at += chunk.len() as u64;
    }
    match *at == end {
        true => Ok(()),
        false => Err(SourceError::Unreachable {
            what: file.what(),
            reason: format!("the answer ended at byte {at} of {end}"),
        }),
    }
}

/// One file to bring.
pub(super) struct Wanted {
    pub(super) file: Box<dyn Ranges>,
    pub(super) size: u64,
    /// Under the staging folder; checked by whoever named it.
    pub(super) to: PathBuf,
}

/// Brings all files, a few at a time, and puts the folders on the disk for good.
pub(super) async fn download_all(
    wanted: Vec<Wanted>,
    into: &Path,
    backoff: Backoff,
) -> Result<(), SourceError> {
    let folders = folders_of(&wanted, into);
    for folder in &folders {
        super::super::fetch::make_folder(folder).map_err(io_error(folder))?;
    }
    let mut downloads = futures_util::stream::iter(wanted)
        .map(
            |wanted| async move { download(&*wanted.file, wanted.size, &wanted.to, backoff).await },
        )
        .buffer_unordered(super::DOWNLOADS_MAX);
    while let Some(done) = downloads.next().await {
        done?;
    }
    drop(downloads);
    super::blocking("the staging folder", move || {
        for folder in &folders {
            super::super::fetch::sync_folder(folder).map_err(io_error(folder))?;
        }
        Ok(())
    })
    .await
}

/// The folders that files go to, `into` too; each before those beneath it.
fn folders_of(wanted: &[Wanted], into: &Path) -> BTreeSet<PathBuf> {
    let above = wanted.iter().flat_map(|wanted| wanted.to.ancestors().skip(1));
    above.filter(|path| path.starts_with(into)).map(Path::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Gives `chunk` bytes of each request and then ends, breaks, or waits.
    struct Flaky {
        content: Vec<u8>,
        chunk: usize,
        break_off: bool,
        surplus: usize,
        opened: AtomicUsize,
    }

    impl Flaky {
        fn new(size: usize, chunk: usize, break_off: bool) -> Self {
            let content = (0..size).map(|at| u8::try_from(at % 251).unwrap()).collect();
            Self { content, chunk, break_off, surplus: 0, opened: AtomicUsize::new(0) }
        }
    }

    impl Ranges for Flaky {
        fn what(&self) -> String {
            "file".to_owned()
        }

        fn open(&self, range: Range<u64>) -> BoxFuture<'_, Result<Parts, SourceError>> {
            self.opened.fetch_add(1, Ordering::Relaxed);
            let (start, end) =
                (usize::try_from(range.start).unwrap(), usize::try_from(range.end).unwrap());
            let end = end.min(start + self.chunk);
            let mut bytes = self.content[start..end].to_vec();
            bytes.extend(vec![0; self.surplus]);
            let mut parts = vec![Ok(Bytes::from(bytes))];
            if self.break_off && end < self.content.len() {
                parts.push(Err(SourceError::Unreachable {
                    what: self.what(),
                    reason: "reset".to_owned(),
                }));
            }
            let end = range.end;
            Box::pin(
                async move { Ok(Parts { bytes: futures_util::stream::iter(parts).boxed(), end }) },
            )
        }
    }

    const QUICK: Backoff = Backoff { first: Duration::ZERO, longest: Duration::ZERO };

    async fn run(file: &Flaky, size: u64) -> Result<Vec<u8>, SourceError> {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("out");
        download(file, size, &to, QUICK).await?;
        Ok(std::fs::read(to).unwrap())
    }

    #[tokio::test]
    async fn a_download_is_taken_up_where_it_broke_off() {
        for break_off in [false, true] {
            let file = Flaky::new(1_000_000, 100_000, break_off);
            assert_eq!(run(&file, 1_000_000).await.unwrap(), file.content);
            assert_eq!(file.opened.load(Ordering::Relaxed), 10);
        }
        let empty = Flaky::new(0, 10, false);
        assert_eq!(run(&empty, 0).await.unwrap(), b"");
        assert_eq!(empty.opened.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_drip_is_given_up() {
        let file = Flaky::new(1_000_000, 10, true);
        assert!(matches!(run(&file, 1_000_000).await, Err(SourceError::Unreachable { .. })));
        assert_eq!(file.opened.load(Ordering::Relaxed), 5);
    }

    #[tokio::test]
    async fn more_than_asked_for_is_refused() {
        let file = Flaky { surplus: 1, ..Flaky::new(100, 100, false) };
        assert!(matches!(run(&file, 100).await, Err(SourceError::Answer { .. })));
    }

    #[tokio::test]
    async fn nothing_is_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("out");
        std::fs::write(&to, "there").unwrap();
        let file = Flaky::new(10, 10, false);
        assert!(matches!(download(&file, 10, &to, QUICK).await, Err(SourceError::Io { .. })));
        assert_eq!(std::fs::read(&to).unwrap(), b"there");
    }
}
