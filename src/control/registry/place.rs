//! Where a version's files are read: in the repository's own folder, or in a private one that they
//! were downloaded to.

use std::cell::RefCell;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use super::load::How;
use super::{Override, Shared};
use crate::control::fetch::Staging;
use crate::control::manifest::Manifest;
use crate::control::manifest_of;
use crate::control::scan::Repository;
use crate::domain::{ErrorKind, Failure, ModelFile, ModelName, Version, VersionPolicy};

/// A repository to read from; what was downloaded goes when this does.
pub(super) struct Place {
    pub(super) repository: Repository,
    /// A client sent it with its load call.
    pub(super) brought: bool,
    _staging: Option<Staging>,
}

impl Place {
    /// The repository's own folder.
    pub(super) fn here(shared: &Shared) -> Self {
        Self { repository: shared.repository(), brought: false, _staging: None }
    }
}

/// One model's versions where they lie: its configuration is read once, or comes with each version.
pub(super) struct Shelf<'a> {
    shared: &'a Shared,
    model: &'a ModelName,
    last: RefCell<Option<Brought>>,
}

/// What was brought last, and of which version; of a folder, all versions are in one place.
type Brought = (Option<Version>, Rc<(Place, Manifest)>);

impl<'a> Shelf<'a> {
    pub(super) fn new(shared: &'a Shared, model: &'a ModelName) -> Self {
        Self { shared, model, last: RefCell::default() }
    }

    /// Which versions are kept loaded: by the model's configuration, as `newest` has it if it lies
    /// elsewhere, or else by the gateway's.
    pub(super) fn policy(&self, newest: Option<Version>) -> Result<Option<VersionPolicy>, Failure> {
        let local = self.shared.source.local().is_some();
        let loaded = self.shared.board.loaded(self.model);
        let own = match (local, newest, loaded.last()) {
            (false, Some(newest), None) => {
                // What cannot be read now is reported when the version is loaded.
                self.open(newest).ok().and_then(|at| at.1.settings.versions.clone())
            }
            (true, Some(newest), _) => self.open(newest)?.1.settings.versions.clone(),
            (_, _, Some(served)) => served.settings.versions.clone(),
            (_, None, None) => None,
        };
        Ok(own.or_else(|| self.shared.retention()))
    }

    pub(super) fn load(&self, version: Version, how: How<'_>) -> Result<(), Failure> {
        match self.open(version) {
            Ok(at) => self.shared.load_version(&at.0, self.model, version, &at.1, how),
            Err(failure) => {
                let reason = &failure.message;
                tracing::error!(model = %self.model, %version, reason, "version not loaded");
                self.shared.enter_unless_serving(self.model, version, reason);
                Err(failure)
            }
        }
    }

    fn open(&self, version: Version) -> Result<Rc<(Place, Manifest)>, Failure> {
        let local = self.shared.source.local().is_some();
        let key = (!local).then_some(version);
        if let Some((of, at)) = &*self.last.borrow()
            && *of == key
        {
            return Ok(Rc::clone(at));
        }
        let place = match local {
            true => Place::here(self.shared),
            false => self.shared.staged(self.model, version)?,
        };
        let manifest = manifest_of(&place.repository, self.model, None)?;
        let at = Rc::new((place, manifest));
        self.last.replace(Some((key, Rc::clone(&at))));
        Ok(at)
    }
}

impl Shared {
    /// A version's files, downloaded to a private folder.
    fn staged(&self, model: &ModelName, version: Version) -> Result<Place, Failure> {
        let staging = self.staging()?;
        self.wait(self.source.stage(model, version, staging.path()))?;
        let repository = Repository::of_models(staging.path());
        Ok(Place { repository, brought: false, _staging: Some(staging) })
    }

    /// A place made of the files that a client sent.
    pub(super) fn brought(&self, model: &ModelName, brought: &Override) -> Result<Place, Failure> {
        let staging = self.staging()?;
        place_files(&staging.path().join(model.as_str()), &brought.files)?;
        let repository = Repository::of_models(staging.path());
        Ok(Place { repository, brought: true, _staging: Some(staging) })
    }

    fn staging(&self) -> Result<Staging, Failure> {
        self.preparer.staging().map_err(|error| Failure::invalid(error.to_string()))
    }

    /// Waits on this loader thread for what the source does asynchronously.
    pub(super) fn wait<T, E: std::fmt::Display>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Failure> {
        let done = self.runtime.block_on(work);
        done.map_err(|error| Failure::new(ErrorKind::Unavailable, error.to_string()))
    }
}

/// Writes the files of a load call into a private folder.
fn place_files(folder: &Path, files: &[ModelFile]) -> Result<(), Failure> {
    for file in files {
        let path = Path::new(&file.path);
        let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
        if !plain || file.path.is_empty() || file.path.contains('\0') {
            let path = &file.path;
            let message = format!("file '{path}' must be a path inside the model's folder");
            return Err(Failure::invalid(message));
        }
        let to: PathBuf = folder.join(path);
        let made = to.parent().map_or(Ok(()), crate::control::fetch::make_folder);
        made.and_then(|()| std::fs::write(&to, &file.content)).map_err(|error| {
            tracing::error!(file = file.path, %error, "file of a load call not written");
            let message = format!("file '{}' could not be stored", file.path);
            Failure::new(ErrorKind::Internal, message)
        })?;
    }
    Ok(())
}
