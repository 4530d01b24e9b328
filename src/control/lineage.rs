//! Where a version comes from: who owns it, and which code, data and run made it.
//!
//! ```text
//! lineage.toml ─┐
//! *.dvc, dvc.lock ─┼─▶ of the folder ─▶ merged ─▶ the release record
//! registry: run, tags, datasets ────────▶
//! ```
//!
//! Invariants:
//! - What the folder says wins over what the registry says, and where they differ the difference is
//!   kept: a record that names two commits is worth a look.
//! - Every list and text has a limit. All of it comes from elsewhere and is only ever shown.

use std::collections::BTreeMap;
use std::io;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::confined::Folder;
use super::yaml;

/// File of a version that says where it comes from.
pub(super) const LINEAGE_FILE: &str = "lineage.toml";
const DVC_LOCK: &str = "dvc.lock";
const FILE_SIZE_MAX: u64 = 1 << 20;
/// Most `.dvc` files that are read.
const DVC_FILES_MAX: usize = 32;
/// Most entries of any list or map.
pub(super) const ENTRIES_MAX: usize = 256;
/// Longest text, in characters.
pub(super) const TEXT_MAX: usize = 1024;

/// Where a version comes from, as far as anybody says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Lineage {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub git: Option<Git>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Data>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub training: Option<Training>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub datasets: Vec<Dataset>,
    /// Versions of what it was made with.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub frameworks: BTreeMap<String, String>,
    /// What the version's own file claims, which is not an approval given here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub claimed_approvals: Vec<ClaimedApproval>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registry: Option<Registered>,
    /// Where the version's files and its registry say different things.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conflicts: Vec<String>,
    /// What was not understood.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Git {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repository: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The team's own word for it, or `md5:…` when one file of DVC says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// What the `.dvc` files and the `dvc.lock` beside the model name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dvc: Vec<DvcEntry>,
}

/// One file or folder under DVC.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DvcEntry {
    /// The file that says so.
    pub file: String,
    /// Stage of the pipeline, in a `dvc.lock`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<String>,
    pub role: DvcRole,
    pub path: String,
    /// As DVC writes it: 32 hexadecimal digits, for a folder with `.dir` behind.
    pub md5: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DvcRole {
    /// What a stage reads.
    Dependency,
    #[default]
    Output,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Training {
    /// Id of a run, or what it was in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Script or notebook.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entry_point: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub started_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub ended_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Dataset {
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// What it was used for: `training`, `evaluation`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ClaimedApproval {
    pub by: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
}

/// What the registry itself keeps of the version.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Registered {
    /// Where it was found.
    pub source: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub created_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
}

/// `lineage.toml`. Keys that mean nothing here are noted: teams write more down than we read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct File {
    owner: Option<String>,
    /// Short for `git.commit`.
    git_commit: Option<String>,
    /// Short for `training.run`.
    training_run: Option<String>,
    git: FileGit,
    data: FileData,
    training: FileTraining,
    datasets: Vec<Dataset>,
    frameworks: BTreeMap<String, String>,
    approvals: Vec<FileApproval>,
    #[serde(flatten)]
    rest: BTreeMap<String, toml::Value>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct FileGit {
    commit: Option<String>,
    repository: Option<String>,
    branch: Option<String>,
    #[serde(flatten)]
    rest: BTreeMap<String, toml::Value>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct FileData {
    name: Option<String>,
    version: Option<String>,
    source: Option<String>,
    sha256: Option<String>,
    #[serde(flatten)]
    rest: BTreeMap<String, toml::Value>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct FileTraining {
    run: Option<String>,
    url: Option<String>,
    user: Option<String>,
    entry_point: Option<String>,
    started_at: Option<toml::Value>,
    ended_at: Option<toml::Value>,
    metrics: BTreeMap<String, f64>,
    parameters: BTreeMap<String, toml::Value>,
    #[serde(flatten)]
    rest: BTreeMap<String, toml::Value>,
}

#[derive(Deserialize)]
struct FileApproval {
    by: String,
    at: Option<toml::Value>,
    comment: Option<String>,
}

/// What is wrong with a version's lineage.
#[derive(Debug, thiserror::Error)]
pub enum LineageError {
    #[error("{file}: {reason}")]
    Syntax { file: String, reason: String },
    #[error("{file}: {reason}")]
    Unreadable { file: String, reason: io::Error },
}

/// What a version's folder says; empty when it says nothing.
///
/// # Errors
/// When a file is there and wrong: silence would look like a version that nobody claims.
pub(super) fn read(version: &Folder) -> Result<Lineage, LineageError> {
    let unreadable =
        |file: &str, reason| LineageError::Unreadable { file: file.to_owned(), reason };
    let text =
        |file: &str| version.text(file, FILE_SIZE_MAX).map_err(|reason| unreadable(file, reason));
    let mut lineage = match text(LINEAGE_FILE)? {
        Some(text) => from_toml(&text)?,
        None => Lineage::default(),
    };
    let names = version.names().map_err(|reason| unreadable("the folder", reason))?;
    let is_dvc = |name: &&String| name.ends_with(".dvc") && name.len() > ".dvc".len();
    let mut entries = Vec::new();
    for name in names.iter().filter(is_dvc).take(DVC_FILES_MAX) {
        if let Some(text) = text(name)? {
            entries.extend(from_dvc(name, &text)?);
        }
    }
    if let Some(text) = text(DVC_LOCK)? {
        entries.extend(from_dvc_lock(&text)?);
    }
    if !entries.is_empty() {
        entries.truncate(ENTRIES_MAX);
        let data = lineage.data.get_or_insert_default();
        data.version = data.version.take().or_else(|| sole_output(&entries));
        data.dvc = entries;
    }
    Ok(lineage)
}

/// The data's version when one `.dvc` file alone speaks of data.
fn sole_output(entries: &[DvcEntry]) -> Option<String> {
    let outputs: Vec<&DvcEntry> = entries
        .iter()
        .filter(|entry| entry.stage.is_none() && entry.role == DvcRole::Output)
        .collect();
    match outputs[..] {
        [only] => Some(format!("md5:{}", only.md5)),
        _ => None,
    }
}

/// Reads `lineage.toml`.
///
/// # Errors
/// When it is no TOML, or has a key that means nothing.
pub fn from_toml(text: &str) -> Result<Lineage, LineageError> {
    let syntax = |reason: String| LineageError::Syntax { file: LINEAGE_FILE.to_owned(), reason };
    let file: File = toml::from_str(text).map_err(|error| syntax(error.message().to_owned()))?;
    let time = |key: &str, value: Option<toml::Value>| -> Result<Option<Timestamp>, LineageError> {
        let Some(value) = value else { return Ok(None) };
        let text = shown(&value);
        let parsed = text.parse::<Timestamp>();
        parsed.map(Some).map_err(|_| {
            syntax(format!("{key}: expected a time like 2026-01-31T09:30:00Z, got '{text}'"))
        })
    };
    let named = |text: Option<String>| text.filter(|text| !text.is_empty());
    let parameters = file.training.parameters.iter();
    let training = Training {
        run: named(file.training.run).or(named(file.training_run)),
        url: named(file.training.url),
        user: named(file.training.user),
        entry_point: named(file.training.entry_point),
        started_at: time("training.started_at", file.training.started_at)?,
        ended_at: time("training.ended_at", file.training.ended_at)?,
        metrics: file.training.metrics,
        parameters: parameters.map(|(name, value)| (name.clone(), shown(value))).collect(),
    };
    let git = Git {
        commit: named(file.git.commit).or(named(file.git_commit)),
        repository: named(file.git.repository),
        branch: named(file.git.branch),
    };
    let data = Data {
        name: named(file.data.name),
        version: named(file.data.version),
        source: named(file.data.source),
        sha256: named(file.data.sha256),
        dvc: Vec::new(),
    };
    let claim = |approval: FileApproval| ClaimedApproval {
        by: approval.by,
        at: approval.at.as_ref().map(shown),
        comment: approval.comment,
    };
    let unknown = [
        ("", file.rest),
        ("git.", file.git.rest),
        ("data.", file.data.rest),
        ("training.", file.training.rest),
    ];
    let unknown = unknown.into_iter().flat_map(|(section, rest)| {
        rest.into_keys().map(move |key| format!("{section}{}", short(&key)))
    });
    let lineage = Lineage {
        owner: named(file.owner),
        git: (git != Git::default()).then_some(git),
        data: (data != Data::default()).then_some(data),
        training: (training != Training::default()).then_some(training),
        datasets: file.datasets,
        frameworks: file.frameworks,
        claimed_approvals: file.approvals.into_iter().map(claim).collect(),
        notes: unknown.map(|key| format!("{LINEAGE_FILE}: '{key}' means nothing here")).collect(),
        ..Lineage::default()
    };
    Ok(lineage.bounded())
}

/// A time of TOML, or a text, without quotes.
fn shown(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => short(text),
        other => short(&other.to_string()),
    }
}

#[derive(Deserialize)]
struct DvcStage {
    #[serde(default)]
    deps: Vec<DvcItem>,
    #[serde(default)]
    outs: Vec<DvcItem>,
}

#[derive(Deserialize)]
struct DvcItem {
    path: Option<String>,
    md5: Option<String>,
    size: Option<u64>,
}

#[derive(Deserialize)]
struct DvcLock {
    #[serde(default)]
    stages: BTreeMap<String, DvcStage>,
}

fn from_dvc(file: &str, text: &str) -> Result<Vec<DvcEntry>, LineageError> {
    let stage: DvcStage = yaml::parse(text)
        .map_err(|reason| LineageError::Syntax { file: file.to_owned(), reason })?;
    entries(file, None, stage)
}

fn from_dvc_lock(text: &str) -> Result<Vec<DvcEntry>, LineageError> {
    let lock: DvcLock = yaml::parse(text)
        .map_err(|reason| LineageError::Syntax { file: DVC_LOCK.to_owned(), reason })?;
    let mut all = Vec::new();
    for (name, stage) in lock.stages.into_iter().take(ENTRIES_MAX) {
        all.extend(entries(DVC_LOCK, Some(&name), stage)?);
    }
    Ok(all)
}

fn entries(
    file: &str,
    stage: Option<&str>,
    found: DvcStage,
) -> Result<Vec<DvcEntry>, LineageError> {
    let deps = found.deps.into_iter().map(|item| (DvcRole::Dependency, item));
    let outs = found.outs.into_iter().map(|item| (DvcRole::Output, item));
    let mut entries = Vec::new();
    for (role, item) in deps.chain(outs).take(ENTRIES_MAX) {
        // Code and parameters of a stage may be tracked by Git alone.
        let Some(md5) = item.md5 else { continue };
        let digits = md5.strip_suffix(".dir").unwrap_or(&md5);
        if digits.len() != 32 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let reason = format!("expected 32 hexadecimal digits, got '{}'", short(&md5));
            return Err(LineageError::Syntax { file: file.to_owned(), reason });
        }
        entries.push(DvcEntry {
            file: short(file),
            stage: stage.map(short),
            role,
            path: short(&item.path.unwrap_or_default()),
            md5: md5.to_ascii_lowercase(),
            size: item.size,
        });
    }
    Ok(entries)
}

/// Cut to the limit, without control characters: it is shown on terminals.
pub(super) fn short(text: &str) -> String {
    text.chars().filter(|char| !char.is_control()).take(TEXT_MAX).collect()
}

impl Lineage {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What this says, and where it says nothing what `registry` says.
    #[must_use]
    pub fn merged(mut self, registry: Self) -> Self {
        let mut conflicts = Vec::new();
        fill(&mut self.owner, registry.owner, "owner", &mut conflicts);
        if let Some(theirs) = registry.git {
            let ours = self.git.get_or_insert_default();
            fill(&mut ours.commit, theirs.commit, "git.commit", &mut conflicts);
            fill(&mut ours.repository, theirs.repository, "git.repository", &mut conflicts);
            fill(&mut ours.branch, theirs.branch, "git.branch", &mut conflicts);
        }
        if let Some(theirs) = registry.data {
            let ours = self.data.get_or_insert_default();
            fill(&mut ours.name, theirs.name, "data.name", &mut conflicts);
            fill(&mut ours.sha256, theirs.sha256, "data.sha256", &mut conflicts);
            fill(&mut ours.version, theirs.version, "data.version", &mut conflicts);
            fill(&mut ours.source, theirs.source, "data.source", &mut conflicts);
            if ours.dvc.is_empty() {
                ours.dvc = theirs.dvc;
            }
        }
        if let Some(theirs) = registry.training {
            let ours = self.training.get_or_insert_default();
            fill(&mut ours.run, theirs.run, "training.run", &mut conflicts);
            fill(&mut ours.url, theirs.url, "training.url", &mut conflicts);
            fill(&mut ours.user, theirs.user, "training.user", &mut conflicts);
            ours.entry_point = ours.entry_point.take().or(theirs.entry_point);
            ours.started_at = ours.started_at.or(theirs.started_at);
            ours.ended_at = ours.ended_at.or(theirs.ended_at);
            for (name, value) in theirs.metrics {
                ours.metrics.entry(name).or_insert(value);
            }
            for (name, value) in theirs.parameters {
                ours.parameters.entry(name).or_insert(value);
            }
        }
        for dataset in registry.datasets {
            if !self.datasets.contains(&dataset) {
                self.datasets.push(dataset);
            }
        }
        for (name, version) in registry.frameworks {
            self.frameworks.entry(name).or_insert(version);
        }
        self.registry = self.registry.or(registry.registry);
        self.notes.extend(registry.notes);
        self.conflicts.extend(conflicts);
        self.bounded()
    }

    /// Within the limits.
    #[must_use]
    pub fn bounded(mut self) -> Self {
        let cut = |text: &mut Option<String>| {
            if let Some(text) = text {
                *text = short(text);
            }
        };
        cut(&mut self.owner);
        if let Some(git) = &mut self.git {
            [&mut git.commit, &mut git.repository, &mut git.branch].into_iter().for_each(cut);
        }
        if let Some(data) = &mut self.data {
            let texts = [&mut data.name, &mut data.sha256, &mut data.version, &mut data.source];
            texts.into_iter().for_each(cut);
            data.dvc.truncate(ENTRIES_MAX);
        }
        if let Some(training) = &mut self.training {
            let Training { run, url, user, entry_point, .. } = training;
            [run, url, user, entry_point].into_iter().for_each(cut);
            training.metrics = bounded_map(std::mem::take(&mut training.metrics), |value| value);
            let parameters = std::mem::take(&mut training.parameters);
            training.parameters = bounded_map(parameters, |value| short(&value));
        }
        let frameworks = std::mem::take(&mut self.frameworks);
        self.frameworks = bounded_map(frameworks, |value| short(&value));
        self.datasets.truncate(ENTRIES_MAX);
        for dataset in &mut self.datasets {
            dataset.name = short(&dataset.name);
            [&mut dataset.digest, &mut dataset.source, &mut dataset.context]
                .into_iter()
                .for_each(cut);
        }
        self.claimed_approvals.truncate(ENTRIES_MAX);
        for approval in &mut self.claimed_approvals {
            approval.by = short(&approval.by);
            [&mut approval.at, &mut approval.comment].into_iter().for_each(cut);
        }
        if let Some(registered) = &mut self.registry {
            registered.source = short(&registered.source);
            [&mut registered.artifact, &mut registered.description].into_iter().for_each(cut);
            let tags = std::mem::take(&mut registered.tags);
            registered.tags = bounded_map(tags, |value| short(&value));
        }
        let frameworks = std::mem::take(&mut self.frameworks);
        self.frameworks = bounded_map(frameworks, |value| short(&value));
        self.conflicts.truncate(ENTRIES_MAX);
        self.notes.truncate(ENTRIES_MAX);
        self
    }
}

/// The first entries of a map, with short names.
pub(super) fn bounded_map<T>(
    map: BTreeMap<String, T>,
    cut: impl Fn(T) -> T,
) -> BTreeMap<String, T> {
    map.into_iter().take(ENTRIES_MAX).map(|(name, value)| (short(&name), cut(value))).collect()
}

fn fill(
    ours: &mut Option<String>,
    theirs: Option<String>,
    what: &str,
    conflicts: &mut Vec<String>,
) {
    match (&*ours, theirs) {
        (None, theirs) => *ours = theirs,
        (Some(ours), Some(theirs)) if *ours != theirs => {
            let (ours, theirs) = (short(ours), short(&theirs));
            conflicts.push(format!("{what}: the files say '{ours}', the registry '{theirs}'"));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = r#"
        owner = "risk@example.com"
        training_run = "r-17"
        ticket = "RISK-9"
        [git]
        commit = "4f3c2b1a"
        repository = "https://example.com/risk.git"
        [data]
        name = "claims"
        version = "2026-01"
        rows = 17
        [training]
        started_at = 2026-01-31T09:30:00Z
        metrics = { auc = 0.91 }
        parameters = { depth = 3, kind = "tree" }
        [frameworks]
        onnx = "1.22.0"
        [[datasets]]
        name = "claims"
        digest = "ab12"
        [[approvals]]
        by = "alice"
        at = 2026-02-01T10:00:00Z
    "#;

    #[test]
    fn the_file_is_read_whole() {
        let lineage = from_toml(FULL).unwrap();
        assert_eq!(lineage.owner.as_deref(), Some("risk@example.com"));
        assert_eq!(lineage.git.as_ref().unwrap().commit.as_deref(), Some("4f3c2b1a"));
        let training = lineage.training.as_ref().unwrap();
        assert_eq!(training.run.as_deref(), Some("r-17"));
        assert_eq!(training.started_at.unwrap().to_string(), "2026-01-31T09:30:00Z");
        assert_eq!((training.metrics["auc"], &*training.parameters["depth"]), (0.91, "3"));
        assert_eq!(lineage.frameworks["onnx"], "1.22.0");
        assert_eq!(lineage.claimed_approvals[0].at.as_deref(), Some("2026-02-01T10:00:00Z"));
        assert_eq!(lineage.notes.len(), 2, "{:?}", lineage.notes);
        let json = serde_json::to_string(&lineage).unwrap();
        assert_eq!(serde_json::from_str::<Lineage>(&json).unwrap(), lineage);
        for bad in ["owner = 1", "git_commit = ['x']", "nonsense", "[training]\nended_at = 'x'"] {
            assert!(from_toml(bad).is_err(), "{bad}");
        }
        let long = format!("owner = '{}'", "x".repeat(5000));
        assert_eq!(from_toml(&long).unwrap().owner.unwrap().len(), TEXT_MAX);
        assert!(from_toml("git_commit = ''\n[data]").unwrap().is_empty());
    }

    #[test]
    fn the_repository_s_own_models_say_where_they_come_from() {
        let models = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
        let folder = Folder::open(&models.join("iris/2")).unwrap();
        let lineage = read(&folder).unwrap();
        assert_eq!(lineage.owner.as_deref(), Some("Tidegate maintainers"));
        assert_eq!(lineage.data.unwrap().name.as_deref(), Some("iris"));
        assert!(lineage.notes.is_empty(), "{:?}", lineage.notes);
    }

    #[test]
    fn dvc_files_say_the_data_s_version() {
        let dir = tempfile::tempdir().unwrap();
        let read = || read(&Folder::open(dir.path()).unwrap());
        assert!(read().unwrap().is_empty());
        let md5 = "22e3f61e52c0ba45334d973244efc155";
        let file = format!("outs:\n- md5: {md5}.dir\n  size: 6221\n  nfiles: 3\n  path: data\n");
        std::fs::write(dir.path().join("data.dvc"), &file).unwrap();
        let data = read().unwrap().data.unwrap();
        assert_eq!(data.version, Some(format!("md5:{md5}.dir")));
        assert_eq!(data.dvc[0].path, "data");
        assert_eq!(data.dvc[0].size, Some(6221));

        // Digits alone are a text all the same.
        let digits = "12345678901234567890123456789012";
        let lock = format!(
            "schema: '2.0'\nstages:\n  train:\n    cmd: python train.py\n    deps:\n    - path: \
             data\n      hash: md5\n      md5: {digits}\n    - path: train.py\n    outs:\n    - \
             path: model.onnx\n      md5: {md5}\n      size: 10\n"
        );
        std::fs::write(dir.path().join("dvc.lock"), lock).unwrap();
        std::fs::write(dir.path().join("lineage.toml"), "[data]\nversion = 'v7'").unwrap();
        let data = read().unwrap().data.unwrap();
        assert_eq!(data.version.as_deref(), Some("v7"));
        let seen: Vec<_> =
            data.dvc.iter().map(|entry| (entry.role, entry.path.as_str(), &*entry.md5)).collect();
        let dir_md5 = format!("{md5}.dir");
        assert_eq!(
            seen,
            [
                (DvcRole::Output, "data", dir_md5.as_str()),
                (DvcRole::Dependency, "data", digits),
                (DvcRole::Output, "model.onnx", md5),
            ]
        );
        for bad in ["outs:\n- md5: xyz\n  path: a\n", "outs: 3", "- a"] {
            std::fs::write(dir.path().join("data.dvc"), bad).unwrap();
            assert!(read().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_files_win_and_a_difference_is_kept() {
        let registry = Lineage {
            owner: Some("mlflow-user".to_owned()),
            git: Some(Git { commit: Some("ffff".to_owned()), ..Git::default() }),
            training: Some(Training {
                run: Some("r-17".to_owned()),
                user: Some("bob".to_owned()),
                metrics: BTreeMap::from([("auc".to_owned(), 0.5), ("f1".to_owned(), 0.4)]),
                ..Training::default()
            }),
            ..Lineage::default()
        };
        let merged = from_toml(FULL).unwrap().merged(registry);
        assert_eq!(merged.git.unwrap().commit.as_deref(), Some("4f3c2b1a"));
        let training = merged.training.unwrap();
        assert_eq!(training.user.as_deref(), Some("bob"));
        assert_eq!((training.metrics["auc"], training.metrics["f1"]), (0.91, 0.4));
        assert_eq!(merged.conflicts.len(), 2, "{:?}", merged.conflicts);
        assert!(merged.conflicts[1].starts_with("git.commit: the files say '4f3c2b1a'"));
        let alone = Lineage::default().merged(from_toml(FULL).unwrap());
        assert_eq!(alone.owner.as_deref(), Some("risk@example.com"));
        assert!(alone.conflicts.is_empty());
    }
}
