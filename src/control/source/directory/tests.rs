use std::fs;
use std::os::unix::fs::symlink;
use std::time::Instant;

use super::*;

const QUIET: Duration = Duration::from_millis(2000);

struct Repository {
    dir: tempfile::TempDir,
}

impl Repository {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn root(&self) -> std::path::PathBuf {
        self.dir.path().join("models")
    }

    fn write(&self, path: &str, content: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn source(&self) -> Directory {
        self.source_with(|_| {})
    }

    fn source_with(&self, change: impl FnOnce(&mut Settings)) -> Directory {
        fs::create_dir_all(self.root()).unwrap();
        let mut settings = Settings::new(self.root(), self.dir.path().join("state"));
        settings.source.quiet = QUIET;
        change(&mut settings);
        Directory::new(settings)
    }
}

fn name() -> ModelName {
    "m".parse().unwrap()
}

fn version(number: u64) -> Version {
    Version::new(number).unwrap()
}

/// A look as if so much time had passed on both clocks.
fn look(source: &Directory, later: Duration) -> Listing {
    let now = Now::read();
    let now = Now { instant: now.instant + later, wall: now.wall + later };
    source.inner.look(now).unwrap()
}

fn found(listing: &Listing, number: u64) -> VersionListing {
    listing.models[&name()].versions[&version(number)].clone()
}

#[test]
fn what_is_there_at_the_start_is_taken_at_once() {
    let repository = Repository::new();
    repository.write("m/1/model.onnx", "one");
    repository.write("m/1/sub/w.bin", "weights");
    repository.write("m/config.pbtxt", "");
    repository.write("m/draft/model.onnx", "x");
    repository.write("a b/1/model.onnx", "x");
    // Written a moment ago.
    let listing = look(&repository.source(), Duration::ZERO);
    assert!(!found(&listing, 1).settled);
    assert!(listing.recheck.is_some());
    // Written a while ago.
    let source = repository.source();
    let listing = look(&source, QUIET + Duration::from_millis(100));
    let first = found(&listing, 1);
    assert!(first.settled && first.problem.is_none());
    assert_eq!((first.files, first.bytes), (2, 10));
    assert_eq!(listing.recheck, None);
    assert_eq!(listing.models.len(), 1);
    assert_eq!(listing.notes.len(), 1);
    assert_eq!(look(&source, QUIET * 2), listing, "looking changes nothing");
}

#[test]
fn an_upload_is_taken_when_it_is_over() {
    let repository = Repository::new();
    repository.write("m/1/model.onnx", "one");
    let source = repository.source();
    let start = QUIET + Duration::from_millis(100);
    assert!(found(&look(&source, start), 1).settled);

    repository.write("m/2/model.onnx", "tw");
    assert!(!found(&look(&source, start), 2).settled);
    repository.write("m/2/model.onnx", "two");
    let at = start + QUIET - Duration::from_millis(1);
    assert!(!found(&look(&source, at), 2).settled, "it grew");
    assert!(!found(&look(&source, at + QUIET / 2), 2).settled);
    assert!(found(&look(&source, at + QUIET + Duration::from_millis(50)), 2).settled);

    // Tools that set times back do not hurry it.
    repository.write("m/3/model.onnx", "three");
    let old = SystemTime::now() - Duration::from_secs(9999);
    let file =
        fs::File::options().write(true).open(repository.root().join("m/3/model.onnx")).unwrap();
    file.set_modified(old).unwrap();
    assert!(!found(&look(&source, at + QUIET * 2), 3).settled);

    // Nor when they are there at the first look: the time of the change cannot be set back.
    let fresh = repository.source();
    assert!(!found(&look(&fresh, Duration::ZERO), 3).settled);
}

#[test]
fn a_list_of_digests_that_is_whole_ends_the_wait() {
    let repository = Repository::new();
    let source = repository.source();
    look(&source, Duration::ZERO);
    let sum = "0".repeat(64);
    let settled = |source: &Directory| found(&look(source, Duration::ZERO), 1).settled;
    repository.write("m/1/model.onnx", "one");
    assert!(!settled(&source));
    for (sums, whole) in [
        ("", false),
        ("nonsense\n", false),
        (&*format!("{sum}  model.onnx"), false),
        (&*format!("{sum}  model.onnx\n{sum}  w.bin\n"), false),
        (&*format!("{sum}  model.onnx\n"), true),
    ] {
        repository.write("m/1/SHA256SUMS", sums);
        assert_eq!(settled(&source), whole, "{sums}");
    }
    // With keys the signature is the last file.
    const KEY: &str = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3";
    let signed = repository.source_with(|settings| {
        settings.trusted_keys = crate::control::TrustedKeys::parse(KEY).unwrap()
    });
    assert!(!settled(&signed));
    repository.write("m/1/SHA256SUMS.minisig", "x");
    assert!(settled(&signed));
}

#[test]
fn any_change_of_a_file_is_another_fingerprint() {
    let repository = Repository::new();
    repository.write("m/1/model.onnx", "one");
    repository.write("m/1/w.bin", "w");
    repository.write("m/config.pbtxt", "a");
    let source = repository.source();
    let print = || {
        let listing = look(&source, Duration::ZERO);
        (found(&listing, 1).fingerprint, listing.models[&name()].config)
    };
    let mut seen = vec![print()];
    let mut changed = |what: &str, of_config: bool| {
        let (now, before) = (print(), *seen.last().unwrap());
        assert_eq!(now.0 != before.0, !of_config, "{what}");
        assert_eq!(now.1 != before.1, of_config, "{what}");
        seen.push(now);
    };
    let path = |path: &str| repository.root().join(path);
    repository.write("m/1/model.onnx", "two!");
    changed("size", false);
    // Same size and time, another file in its place.
    let time = fs::metadata(path("m/1/w.bin")).unwrap().modified().unwrap();
    repository.write("m/1/.w.bin.tmp", "v");
    changed("a temporary file", false);
    fs::File::options()
        .write(true)
        .open(path("m/1/.w.bin.tmp"))
        .unwrap()
        .set_modified(time)
        .unwrap();
    fs::rename(path("m/1/.w.bin.tmp"), path("m/1/w.bin")).unwrap();
    changed("replaced", false);
    fs::rename(path("m/1/w.bin"), path("m/1/v.bin")).unwrap();
    changed("renamed", false);
    fs::remove_file(path("m/1/v.bin")).unwrap();
    changed("removed", false);
    symlink("/etc/passwd", path("m/1/out")).unwrap();
    changed("a link that leads away", false);
    repository.write("m/config.pbtxt", "ab");
    changed("configuration", true);
}

#[test]
fn odd_folders_are_bounded_and_harmless() {
    let repository = Repository::new();
    repository.write("m/1/model.onnx", "one");
    symlink(".", repository.root().join("m/1/loop")).unwrap();
    symlink("..", repository.root().join("m/1/up")).unwrap();
    symlink("../../secret", repository.root().join("m/1/out")).unwrap();
    fs::write(repository.dir.path().join("secret"), "s").unwrap();
    let deep: std::path::PathBuf = (0..20).map(|_| "d").collect();
    repository.write(&format!("m/2/{}/x", deep.display()), "x");
    for at in 0..FILES_MAX + 1 {
        repository.write(&format!("m/3/{at}"), "");
    }
    let source = repository.source_with(|settings| settings.model_size_max = 10);
    repository.write("m/4/model.onnx", "more than ten");
    let listing = look(&source, Duration::ZERO);
    assert_eq!(found(&listing, 1).files, 1);
    assert_eq!(found(&listing, 2).files, 0);
    assert!(found(&listing, 3).problem.unwrap().contains("files"));
    assert!(found(&listing, 4).problem.unwrap().contains("limit is 10"));
    // A model's folder that is a file, or a link that leads away, hides no other.
    repository.write("file", "x");
    symlink("/etc", repository.root().join("etc")).unwrap();
    let listing = look(&source, Duration::ZERO);
    let etc: ModelName = "etc".parse().unwrap();
    assert!(listing.models[&etc].problem.is_some());
    assert_eq!(found(&listing, 1).files, 1);
}

#[tokio::test]
async fn a_version_is_staged_without_what_lies_outside() {
    let repository = Repository::new();
    repository.write("m/1/model.onnx", "one");
    repository.write("m/1/sub/w.bin", "weights");
    repository.write("m/config.pbtxt", "max_batch_size: 4");
    repository.write("m/2/model.onnx", "two");
    symlink("/etc/passwd", repository.root().join("m/1/out")).unwrap();
    let source = repository.source();
    let dir = tempfile::tempdir().unwrap();
    let staged = source.stage(&name(), version(1), dir.path()).await.unwrap();
    assert_eq!((staged.files, staged.bytes), (2, 10));
    assert_eq!(staged.fingerprint, found(&source.list().await.unwrap(), 1).fingerprint);
    assert_eq!(fs::read(dir.path().join("m/1/sub/w.bin")).unwrap(), b"weights");
    assert_eq!(fs::read(dir.path().join("m/config.pbtxt")).unwrap(), b"max_batch_size: 4");
    assert!(!dir.path().join("m/1/out").exists() && !dir.path().join("m/2").exists());
    let gone = source.stage(&name(), version(9), dir.path()).await;
    assert!(matches!(gone, Err(SourceError::Missing { .. })), "{gone:?}");
    assert!(source.lineage(&name(), version(1)).await.unwrap().registry.is_some());
    assert!(source.lineage(&name(), version(9)).await.is_err());
}

#[tokio::test]
async fn one_model_s_own_folder_is_listed_too() {
    let repository = Repository::new();
    repository.write("model.onnx", "flat");
    let source = repository.source_with(|settings| settings.model_name = Some(name()));
    let listing = source.list().await.unwrap();
    assert_eq!(found(&listing, 1).files, 1);
    let dir = tempfile::tempdir().unwrap();
    source.stage(&name(), version(1), dir.path()).await.unwrap();
    assert_eq!(fs::read(dir.path().join("m/1/model.onnx")).unwrap(), b"flat");
}

#[tokio::test]
async fn changes_wake_and_looking_does_not() {
    let repository = Repository::new();
    repository.write("m/1/model.onnx", "one");
    let source = repository.source();
    let soon = |source: &Directory| {
        let source = Directory { inner: Arc::clone(&source.inner) };
        async move { tokio::time::timeout(Duration::from_secs(5), source.changed()).await.is_ok() }
    };
    let quiet = || tokio::time::timeout(Duration::from_millis(700), source.changed());
    source.list().await.unwrap();
    for _ in 0..3 {
        source.list().await.unwrap();
    }
    assert!(quiet().await.is_err(), "looking woke somebody");
    repository.write("m/2/model.onnx", "two");
    assert!(soon(&source).await, "a new folder");
    assert_eq!(source.list().await.unwrap().models[&name()].versions.len(), 2);
    while quiet().await.is_ok() {}
    repository.write("m/2/model.onnx", "three");
    assert!(soon(&source).await, "a file of a folder that came later");
    while quiet().await.is_ok() {}
    source.hint();
    let started = Instant::now();
    assert!(soon(&source).await);
    assert!(started.elapsed() >= SETTLE);

    // Another folder in its place is watched from the next look on.
    fs::rename(repository.root(), repository.dir.path().join("old")).unwrap();
    assert!(source.list().await.is_err());
    repository.write("m/1/model.onnx", "one");
    source.list().await.unwrap();
    while quiet().await.is_ok() {}
    repository.write("m/3/model.onnx", "x");
    assert!(soon(&source).await);
}
