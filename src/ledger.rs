//! The ledger: every prediction, every change and every label, in logs that nobody alters unseen.
//!
//! ```text
//! Completion ─▶ record (bytes of a frame) ─▶ Log ──▶ segments ─┬─▶ tree, checkpoints, witnesses
//!                                             │                ├─▶ Parquet, sinks
//!                          answer waits ◀─────┘                └─▶ audit: show, export, verify, replay
//! ```
//!
//! Invariants:
//! - An answer leaves after its record was handed to the operating system (`buffered`) or is on the
//!   disk (`sync`).
//! - What was written is never changed, but for payloads that somebody erased, and then a record of
//!   that is written first.
//! - Everything behind the log reads its segments; nothing behind it can hold back a record.

pub mod frame;
pub mod log;
pub mod reader;
pub mod record;
pub mod follow;
