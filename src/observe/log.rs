//! The program's log: to stderr, as text or JSON, with a level that can change while it runs.
//!
//! Lines of the access log are written by a thread of their own over a bounded channel, so that a
//! slow reader of stderr never holds up a request: a line that finds no room is dropped and
//! counted. All other lines are rare and must not be lost, so they are written where they arise.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing::Metadata;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, reload};

/// Target of the access log's lines.
pub const ACCESS: &str = "access";

/// Says each of its failures; whoever uses it says them once.
const CHATTY: &str = "rskafka=off";

/// Access lines waiting to be written: a second's worth at 8,000 requests a second, about 3 MB.
const QUEUE_MAX: usize = 8192;
/// How long the end of the program waits for lines still to be written.
const FLUSH_WAIT_MAX: Duration = Duration::from_secs(1);

static DROPPED: AtomicU64 = AtomicU64::new(0);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    #[default]
    Text,
    Json,
}

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("log level must be error, warn, info, debug, trace or a filter of those, got '{0}'")]
    Level(String),
    #[error("the log is set up already")]
    Twice,
    #[error("start the log's thread: {0}")]
    Thread(std::io::Error),
}

/// Changes the log's level. Dropping it writes what waits.
pub struct LogHandle {
    filter: reload::Handle<EnvFilter, Registry>,
    queue: SyncSender<Message>,
}

impl LogHandle {
    /// Puts another level or filter (`info`, `warn,tidegate::control=debug`) in force.
    ///
    /// # Errors
    /// `Level` for text that is no filter.
    pub fn set_level(&self, level: &str) -> Result<(), LogError> {
        let filter = filter(level)?;
        self.filter.reload(filter).map_err(|_| LogError::Level(level.to_owned()))
    }
}

impl Drop for LogHandle {
    fn drop(&mut self) {
        let (done, flushed) = sync_channel(1);
        // A full queue means that stderr is stuck, and then waiting longer does not help.
        if self.queue.try_send(Message::Flush(done)).is_ok()
            && flushed.recv_timeout(FLUSH_WAIT_MAX).is_err()
        {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Sets the process's log up; once.
///
/// # Errors
/// A level that is no filter, a second call, or a thread that does not start.
pub fn init(format: Format, level: &str) -> Result<LogHandle, LogError> {
    let (filter, handle) = reload::Layer::new(filter(level)?);
    let (queue, waiting) = sync_channel(QUEUE_MAX);
    let thread = std::thread::Builder::new().name("access-log".into());
    thread.spawn(move || write_lines(&waiting)).map_err(LogError::Thread)?;
    let writer = Stderr { queue: queue.clone() };
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    let registry = tracing_subscriber::registry().with(filter);
    let done = match format {
        Format::Text => registry.with(layer.with_ansi(false)).try_init(),
        Format::Json => registry.with(layer.json().flatten_event(true)).try_init(),
    };
    done.map_err(|_| LogError::Twice)?;
    Ok(LogHandle { filter: handle, queue })
}

/// Access lines dropped since the last call.
pub(super) fn take_dropped() -> u64 {
    DROPPED.swap(0, Ordering::Relaxed)
}

/// A level by itself means our own lines; the libraries beneath stay at `warn` at most. The access
/// log has its own switch, so no level turns it off.
fn filter(level: &str) -> Result<EnvFilter, LogError> {
    let bad = |_| LogError::Level(level.to_owned());
    let directives = match level {
        "off" | "error" | "warn" => format!("{level},{CHATTY},{ACCESS}=info"),
        "info" => format!("warn,{CHATTY},tidegate={level},{ACCESS}=info"),
        "debug" | "trace" => format!("warn,tidegate={level},{ACCESS}=info"),
        // A word by itself would be taken for the name of a target.
        other if !other.contains('=') => return Err(LogError::Level(other.to_owned())),
        other => other.to_owned(),
    };
    EnvFilter::builder().parse(directives).map_err(bad)
}

enum Message {
    Line(Vec<u8>),
    Flush(SyncSender<()>),
}

fn write_lines(waiting: &Receiver<Message>) {
    while let Ok(message) = waiting.recv() {
        match message {
            Message::Line(line) => {
                if std::io::stderr().write_all(&line).is_err() {
                    DROPPED.fetch_add(1, Ordering::Relaxed);
                }
            }
            Message::Flush(done) => drop(done.try_send(())),
        }
    }
}

/// Chooses for each line how it gets to stderr.
struct Stderr {
    queue: SyncSender<Message>,
}

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line::Direct
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Line<'a> {
        if meta.target() == ACCESS { Line::Queued(&self.queue) } else { Line::Direct }
    }
}

enum Line<'a> {
    Direct,
    Queued(&'a SyncSender<Message>),
}

impl Write for Line<'_> {
    /// The subscriber writes each line with one call.
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Direct => std::io::stderr().write_all(line)?,
            Self::Queued(queue) => {
                if queue.try_send(Message::Line(line.to_vec())).is_err() {
                    DROPPED.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_checked() {
        for good in ["info", "error", "warn,tidegate::control=debug"] {
            assert!(filter(good).is_ok(), "{good}");
        }
        for bad in ["", "loud", "tidegate=noisy"] {
            assert!(filter(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_full_queue_drops_and_counts() {
        let (queue, _waiting) = sync_channel(1);
        let mut line = Line::Queued(&queue);
        take_dropped();
        assert_eq!(line.write(b"one\n").unwrap(), 4);
        assert_eq!(line.write(b"two\n").unwrap(), 4);
        assert_eq!(take_dropped(), 1);
    }
}
