//! The limits of the admin listener; `docs/limits.md` says what happens at each.

use std::time::Duration;

/// Connections at once; further ones wait in the kernel's queue.
pub(super) const CONNECTIONS_MAX: usize = 256;
/// Time for a TLS handshake.
pub(super) const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Time to send a request's headers.
pub(super) const HEADER_WAIT_MAX: Duration = Duration::from_secs(10);
/// Time that a connection may have no request.
pub(super) const IDLE_MAX: Duration = Duration::from_secs(60);
/// The same while fewer than [`CONNECTIONS_SCARCE`] are left.
pub(super) const IDLE_SCARCE_MAX: Duration = Duration::from_secs(5);
pub(super) const CONNECTIONS_SCARCE: usize = CONNECTIONS_MAX / 8;
/// Time that a client takes nothing of what we send.
pub(super) const STALL_MAX: Duration = Duration::from_secs(60);
/// Then a connection is asked to end, also one that is read by nobody.
pub(super) const AGE_MAX: Duration = Duration::from_secs(3600);
/// For what is under way when it was asked to end.
pub(super) const LAST_ANSWER_MAX: Duration = Duration::from_secs(60);
/// Request line and headers.
pub(super) const HEADER_BYTES_MAX: usize = 16 << 10;
pub(super) const HEADERS_MAX: usize = 100;
/// Streams of one HTTP/2 connection.
pub(super) const STREAMS_MAX: u32 = 32;
/// Streams that a client resets before they were accepted, and those that its errors reset.
pub(super) const RESETS_MAX: usize = 64;
/// A ping to a silent HTTP/2 client, and the wait for its answer.
pub(super) const PING_EVERY: Duration = Duration::from_secs(30);
pub(super) const PONG_MAX: Duration = Duration::from_secs(10);
/// Receive windows of a stream and a connection.
pub(super) const STREAM_WINDOW: u32 = 64 << 10;
pub(super) const CONNECTION_WINDOW: u32 = 1 << 20;
/// Answer bytes of a stream that wait for its window.
pub(super) const SEND_BUFFER_MAX: usize = 64 << 10;

/// Path and query.
pub(super) const URI_BYTES_MAX: usize = 8 << 10;
/// Characters of a path's parameter that an answer shows.
pub(super) const PATH_TEXT_MAX: usize = 128;
/// Request id that is taken over from the caller.
pub(super) const REQUEST_ID_MAX: usize = 128;
/// One body.
pub(super) const BODY_BYTES_MAX: usize = 1 << 20;
/// Of a larger one so much is taken and thrown away, for so long, so that its sender hears why.
pub(super) const DISCARDED_BYTES_MAX: usize = 8 << 20;
pub(super) const DISCARDED_WAIT_MAX: Duration = Duration::from_secs(2);
/// Time for a whole body to arrive.
pub(super) const BODY_WAIT_MAX: Duration = Duration::from_secs(30);
/// Calls being answered at once; readers of events count apart.
pub(super) const CALLS_MAX: usize = 64;
/// The same for callers without a credential: health, webhooks.
pub(super) const OPEN_CALLS_MAX: usize = 8;
/// Time to answer; a change goes on afterwards.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(60);
/// The same for a load, which tries, loads and warms a model, and an unload, which waits for its
/// last request.
pub(super) const LOAD_ANSWER_MAX: Duration = Duration::from_secs(900);

/// Predictions that are looked for at once: each reads from the disk.
pub(super) const LOOKUPS_MAX: usize = 2;

/// Readers of events at once, and those of one principal.
pub(super) const READERS_MAX: usize = 64;
pub(super) const READERS_OF_ONE_MAX: usize = 16;
/// Then a stream of events ends; its reader comes back with its cursor.
pub(super) const READER_AGE_MAX: Duration = Duration::from_secs(1800);
/// Silence on a stream of events, after which a comment is sent.
pub(super) const HEARTBEAT_EVERY: Duration = Duration::from_secs(15);
/// How often a reader's credential is looked at again.
pub(super) const RECHECK_EVERY: Duration = Duration::from_secs(2);
/// Events that a reader who lags is given at a time, out of the journal.
pub(super) const CATCH_UP_PAGE: usize = 64;

/// Events of one page of the journal: by default, at most, and their bytes.
pub(super) const JOURNAL_PAGE: usize = 100;
pub(super) const JOURNAL_PAGE_MAX: usize = 500;
pub(super) const JOURNAL_PAGE_BYTES_MAX: usize = 4 << 20;
/// Events that are looked at for one page; then it is given as it is, with a cursor.
pub(super) const JOURNAL_LOOKED_AT_MAX: usize = 5000;

/// Refusals of callers without a credential that are journalled in one minute; further ones are
/// only counted.
pub(super) const STRANGERS_JOURNALLED_MAX: u32 = 10;
