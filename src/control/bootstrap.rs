//! The first key of a gateway: an admin's, in a file of its own.
//!
//! Invariants:
//! - The token is on the disk before its key is in the store, so that no crash leaves a key whose
//!   token nobody knows. A token whose key did not get that far is taken up at the next start.
//! - A file that is there is never written over in place, and a token that was revoked does not come
//!   back.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{CWD, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::keys::{self, By, KeyError, NewKey};
use super::store::{Kind, Store, StoreError};
use crate::admit::keys::{GrantRecord, KeyState};
use crate::admit::{Role, Token};

const FILE: &str = "admin-token";
/// More than a token has; the file is not read any further.
const FILE_BYTES_MAX: u64 = 4096;
/// Name of the key, and who makes it.
const NAME: &str = "admin-token";
const ACTOR: &str = "tidegate";

#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    #[error("'{path}': {source}")]
    File { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// Makes a key for an admin when there is none that holds for everything; gives the file that the
/// token is in, alone, with mode 0600. `None` when there was nothing to do.
///
/// # Errors
/// When the file or the store cannot be read or written.
pub fn admin_token(store: &dyn Store, state_dir: &Path) -> Result<Option<PathBuf>, BootstrapError> {
    let now = Timestamp::now();
    let there = keys::list(store).map_err(KeyError::from)?;
    if there.iter().any(|key| key.is_admin() && key.state(now) == KeyState::Live) {
        return Ok(None);
    }
    let path = state_dir.join(FILE);
    let file = |source| BootstrapError::File { path: path.clone(), source };
    let token = match read(&path).map_err(file)? {
        Some(token) if is_unused(store, &token)? => token,
        found => {
            if found.is_some() || path.symlink_metadata().is_ok() {
                // Of a key that has ended, or no token at all.
                fs::remove_file(&path).map_err(file)?;
            }
            write(&path, &Token::generate().map_err(KeyError::from)?).map_err(file)?
        }
    };
    let asked = NewKey {
        name: NAME.to_owned(),
        grants: vec![GrantRecord { role: Role::Admin, models: Vec::new() }],
        expires_at: None,
    };
    let by = By {
        actor: ACTOR.to_owned(),
        reason: Some("there was no admin's key".to_owned()),
        request_id: None,
    };
    match keys::add(store, &asked, &by, &token, now) {
        // Another process began with the same file, and was quicker.
        Ok(_) | Err(KeyError::Store(StoreError::Stale { .. })) => {}
        Err(error) => return Err(error.into()),
    }
    tracing::info!(path = %path.display(), "made an admin's key, its token is in this file");
    Ok(Some(path))
}

fn is_unused(store: &dyn Store, token: &Token) -> Result<bool, BootstrapError> {
    let found = store.document(Kind::Key, token.id()).map_err(KeyError::from)?;
    Ok(found.is_none())
}

/// The token in the file, if that is what it holds.
fn read(path: &Path) -> io::Result<Option<Token>> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).unwrap_or_default();
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // A symbolic link: not of our making.
        Err(error) if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let mut text = String::new();
    match file.take(FILE_BYTES_MAX).read_to_string(&mut text) {
        Ok(_) => Ok(Token::parse(text.trim_end()).ok()),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(None),
        Err(error) => Err(error),
    }
}

/// Puts the token into a file that was not there; gives the one that is in it in the end, which is
/// another's where another process was quicker.
fn write(path: &Path, token: &Token) -> io::Result<Token> {
    let aside = path.with_extension(format!("{}.tmp", std::process::id()));
    // Left by a process that died and had our number.
    match fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside)?;
    file.write_all(format!("{}\n", token.text().expose()).as_bytes())?;
    file.sync_all()?;
    match renameat_with(CWD, &aside, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            fs::remove_file(&aside)?;
            return read(path)?.ok_or_else(|| Errno::EXIST.into());
        }
        // A file system that cannot: nobody else is to be expected on such a one.
        Err(Errno::INVAL | Errno::NOSYS) => fs::rename(&aside, path)?,
        Err(error) => return Err(error.into()),
    }
    if let Some(folder) = path.parent() {
        File::open(folder)?.sync_all()?;
    }
    Ok(token.clone())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;
    use crate::admit::{Action, Gatekeeper};
    use crate::control::store::SqliteStore;

    struct State {
        folder: tempfile::TempDir,
        store: SqliteStore,
    }

    impl State {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let store = SqliteStore::open(folder.path()).unwrap();
            Self { folder, store }
        }

        fn path(&self) -> PathBuf {
            self.folder.path().join(FILE)
        }

        fn start(&self) -> bool {
            admin_token(&self.store, self.folder.path()).unwrap().is_some()
        }

        fn token(&self) -> String {
            fs::read_to_string(self.path()).unwrap().trim_end().to_owned()
        }

        fn is_admin(&self, token: &str) -> bool {
            let keeper = Gatekeeper::new(keys::key_set(&self.store).unwrap());
            let principal = keeper.identify(Some(&format!("Bearer {token}")));
            principal.is_ok_and(|principal| principal.may(Action::ChangeKeys, None))
        }
    }

    #[test]
    fn the_first_start_makes_one_and_no_other_does() {
        let state = State::new();
        assert!(state.start());
        let token = state.token();
        assert!(state.is_admin(&token));
        let mode = fs::metadata(state.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!state.start());
        assert_eq!(state.token(), token);
        assert_eq!(keys::list(&state.store).unwrap().len(), 1);
        let left = fs::read_dir(state.folder.path()).unwrap();
        let left = left
            .filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|e| e == "tmp"));
        assert_eq!(left.count(), 0);
    }

    #[test]
    fn a_crash_between_file_and_store_is_made_good() {
        let state = State::new();
        let token = write(&state.path(), &Token::generate().unwrap()).unwrap();
        assert!(state.start());
        assert_eq!(&state.token(), token.text().expose());
        assert!(state.is_admin(&state.token()));
    }

    #[test]
    fn a_revoked_token_does_not_come_back() {
        let state = State::new();
        assert!(state.start());
        let first = state.token();
        let by = By { actor: "test".to_owned(), ..By::default() };
        let id = Token::parse(&first).unwrap().id().to_owned();
        keys::revoke(&state.store, &id, &by).unwrap();
        assert!(state.start());
        let second = state.token();
        assert!(state.is_admin(&second) && !state.is_admin(&first));
        // With another admin there is nothing to do.
        let grants = vec![GrantRecord { role: Role::Admin, models: vec!["*".to_owned()] }];
        let asked = NewKey { name: "root".to_owned(), grants, expires_at: None };
        keys::create(&state.store, &asked, &by).unwrap();
        keys::revoke(&state.store, Token::parse(&second).unwrap().id(), &by).unwrap();
        assert!(!state.start());
    }

    #[test]
    fn what_lies_in_its_place_is_replaced() {
        let state = State::new();
        fs::write(state.path(), "hello\n").unwrap();
        assert!(state.start());
        assert!(state.is_admin(&state.token()));
        let state = State::new();
        let elsewhere = state.folder.path().join("elsewhere");
        fs::write(&elsewhere, "mine\n").unwrap();
        symlink(&elsewhere, state.path()).unwrap();
        assert!(state.start());
        assert!(state.is_admin(&state.token()));
        assert_eq!(fs::read_to_string(elsewhere).unwrap(), "mine\n");
    }
}
