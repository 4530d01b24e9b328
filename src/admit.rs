//! Who is calling, and may they: keys and certificates, roles, and the models that a role is for.
//!
//! ```text
//! Authorization: Bearer tg_<id>.<secret> ─▶ Gatekeeper ── digest of <id>'s key? ─▶ Principal ─┐
//! client certificate ─▶ PeerName ─▶ Clients (by configuration) ────────────────▶ Principal ─┤
//!                                                                                           ▼
//!                                                  may(action, model)? one table, role::allowed
//! ```
//!
//! Used by both listeners: the data plane's (`transport`) and the admin API's.
//!
//! Invariants:
//! - Deny by default: what no grant allows is not allowed, a record that cannot be read is no key.
//! - A token is known only as its SHA-256, and compared in constant time. The secret has 256 bits,
//!   so a fast hash is right: there is nothing to guess.
//! - A grant that is limited to models allows nothing that concerns the gateway as a whole.
//! - Nothing here prints a secret: [`Secret`] has no `Display`, and its `Debug` says nothing.
//!
//! Deliberately absent: passwords, sessions, and a memory of failed tries (a guess succeeds once in
//! 2^256, whatever their number).

mod gatekeeper;
mod grant;
pub mod keys;
mod peer;
mod role;
mod secret;
mod token;

pub use gatekeeper::{AdmitError, CREDENTIAL_BYTES_MAX, Gatekeeper, authorization};
pub use grant::{Grant, ModelPatterns, PatternError, Principal};
pub use keys::{KeyRecord, KeySet};
pub use peer::{Clients, ClientsError, PeerName};
pub use role::{Action, Role, RoleError};
pub use secret::Secret;
pub use token::{Token, TokenError};
