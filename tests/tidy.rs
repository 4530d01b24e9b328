//! The architecture, checked where it is written: who may import whom, a purpose in each module,
//! files of a readable size, and documents that link to what exists.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What each top module may import beside itself; `docs/architecture.md` says why.
///
/// The request path (`gateway`, `transport`) never imports `control`: they meet in the route table.
const IMPORTS: &[(&str, &[&str])] = &[
    ("domain", &[]),
    ("panics", &[]),
    ("proto", &[]),
    ("secret", &[]),
    ("bucket", &["secret"]),
    ("outbound", &["secret"]),
    ("admit", &["domain"]),
    ("checksum", &["domain"]),
    ("engine", &["checksum", "domain", "proto"]),
    ("observe", &["domain"]),
    ("batch", &["domain", "engine", "observe", "panics"]),
    ("cache", &["domain"]),
    ("drift", &["domain"]),
    ("ledger", &["bucket", "checksum", "domain", "observe", "panics", "proto", "secret"]),
    ("monitor", &["domain", "drift", "observe", "panics"]),
    ("quality", &[]),
    ("feedback", &["domain", "ledger", "observe", "panics", "quality"]),
    ("route", &["domain", "batch", "monitor", "observe"]),
    ("shadow", &["domain", "route", "batch", "ledger", "observe", "panics"]),
    ("gateway", &["domain", "route", "batch", "cache", "feedback", "ledger", "shadow", "observe"]),
    (
        "control",
        &[
            "domain", "admit", "drift", "engine", "batch", "route", "shadow", "feedback", "ledger",
            "monitor", "observe", "outbound", "panics", "proto", "quality", "secret", "bucket",
            "checksum",
        ],
    ),
    (
        "transport",
        &["domain", "admit", "gateway", "route", "batch", "feedback", "observe", "panics", "proto"],
    ),
    (
        "config",
        &[
            "domain",
            "admit",
            "engine",
            "batch",
            "cache",
            "route",
            "shadow",
            "feedback",
            "gateway",
            "ledger",
            "monitor",
            "observe",
            "control",
            "transport",
            "bucket",
            "outbound",
            "secret",
        ],
    ),
    (
        "admin",
        &[
            "domain", "admit", "control", "feedback", "ledger", "monitor", "observe", "route",
            "gateway", "panics",
        ],
    ),
    (
        "app",
        &[
            "domain",
            "admit",
            "admin",
            "engine",
            "batch",
            "route",
            "shadow",
            "feedback",
            "gateway",
            "ledger",
            "monitor",
            "observe",
            "control",
            "transport",
            "config",
            "panics",
        ],
    ),
    (
        "cli",
        &[
            "domain",
            "admit",
            "checksum",
            "admin",
            "drift",
            "engine",
            "batch",
            "route",
            "gateway",
            "ledger",
            "observe",
            "control",
            "transport",
            "config",
            "app",
            "proto",
        ],
    ),
];

/// A file beyond this is two subjects.
const LINES_MAX: usize = 900;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// The top module that a file of `src` belongs to; `None` for `main` and `lib`.
fn module(path: &Path) -> Option<String> {
    let inside = path.strip_prefix(root().join("src")).unwrap();
    let first = inside.components().next().unwrap().as_os_str().to_str().unwrap();
    let name = first.strip_suffix(".rs").unwrap_or(first);
    (!matches!(name, "main" | "lib")).then(|| name.to_owned())
}

/// Modules of ours that a file names outside comments and its tests.
fn imports(text: &str) -> BTreeSet<String> {
    let code = text.split("\n#[cfg(test)]\nmod ").next().unwrap_or_default();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut found = BTreeSet::new();
    let mut in_use = false;
    for line in lines {
        in_use |= line.trim_start().starts_with("use crate::{");
        for rest in line.split("crate::").skip(1) {
            found.insert(identifier(rest));
        }
        // `use crate::{a, b::c}` names one module for each item that is not nested.
        if in_use {
            let items = line.trim().trim_start_matches("use crate::{");
            for item in items.split(',').filter(|item| item.contains("::")) {
                found.insert(identifier(item.trim()));
            }
            in_use = !line.contains(';');
        }
    }
    found.remove("");
    found
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|char| char.is_ascii_alphanumeric() || *char == '_').collect()
}

#[test]
fn modules_import_only_what_lies_beneath() {
    let mut wrong = Vec::new();
    for path in files(&root().join("src"), "rs") {
        let Some(module) = module(&path) else { continue };
        // Tests may reach for whatever shows that it works.
        let of_tests = path.parent().is_some_and(|folder| folder.ends_with("tests"));
        if of_tests || path.file_stem().is_some_and(|name| name == "tests") {
            continue;
        }
        let Some((_, may)) = IMPORTS.iter().find(|(name, _)| *name == module) else {
            wrong.push(format!("{}: module '{module}' is not in the table", shown(&path)));
            continue;
        };
        let text = std::fs::read_to_string(&path).unwrap();
        for other in imports(&text) {
            let ours = IMPORTS.iter().any(|(name, _)| *name == other);
            if ours && other != module && !may.contains(&other.as_str()) {
                wrong.push(format!("{}: '{module}' may not import '{other}'", shown(&path)));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn imports_are_seen() {
    let text = "//! crate::cli\nuse crate::domain::X;\nfn f() { crate::observe::g(); }\n\
                use crate::{app::A, config};\n// crate::main\n#[cfg(test)]\nmod tests {\n\
                use crate::control::Y;\n}\n";
    let found: Vec<String> = imports(text).into_iter().collect();
    assert_eq!(found, ["app", "domain", "observe"]);
}

#[test]
fn every_module_says_what_it_is_for_and_stays_readable() {
    let mut wrong = Vec::new();
    for path in files(&root().join("src"), "rs") {
        let text = std::fs::read_to_string(&path).unwrap();
        // A file of unit tests has its module's purpose.
        let tests = path.file_stem().is_some_and(|name| name == "tests");
        if !tests && !text.starts_with("//!") {
            wrong.push(format!("{}: does not open with '//!'", shown(&path)));
        }
        let lines = text.lines().count();
        if lines > LINES_MAX {
            wrong.push(format!("{}: {lines} lines, the limit is {LINES_MAX}", shown(&path)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Targets of `[text](target)` that are files.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| {
        let target = rest.split([')', ' ', '#']).next()?;
        (!target.is_empty() && !target.contains("://") && !target.starts_with("mailto:"))
            .then_some(target)
    })
}

#[test]
fn documents_link_to_files_that_exist() {
    let mut documents = files(&root().join("docs"), "md");
    documents.extend(["README.md", "CHANGELOG.md"].map(|name| root().join(name)));
    let mut wrong = Vec::new();
    for path in documents.iter().filter(|path| path.exists()) {
        let text = std::fs::read_to_string(path).unwrap();
        for target in links(&text) {
            if !path.parent().unwrap().join(target).exists() {
                wrong.push(format!("{}: links to '{target}', which is not there", shown(path)));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_metric_is_described() {
    let observer = tidegate::observe::Observer::default();
    let page = String::from_utf8(observer.page(None).1.to_vec()).unwrap();
    let document = std::fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    for name in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()) {
        assert!(document.contains(&format!("`{name}")), "docs/metrics.md lacks {name}");
    }
}

/// Cells of the rows of a page's tables.
fn rows(page: &str) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(root().join(page)).unwrap();
    let inner =
        |line: &'_ str| Some(line.strip_prefix('|')?.trim_end().strip_suffix('|')?.to_owned());
    let cells = |row: String| row.split('|').map(|cell| cell.trim().to_owned()).collect();
    text.lines().filter_map(inner).map(cells).collect()
}

#[test]
fn every_limit_has_a_key_that_exists_and_its_default() {
    // Those of a model, which a test of `control` holds against its reader.
    let of_models: BTreeSet<String> = rows("docs/configuration.md")
        .into_iter()
        .filter(|row| row.len() == 2)
        .map(|row| row[0].trim_matches('`').to_owned())
        .collect();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for row in rows("docs/limits.md").iter().skip(2) {
        let [limit, key, default, answer] = &row[..] else {
            wrong.push(format!("{row:?}: expected four cells"));
            continue;
        };
        let heads_group = limit.starts_with("**");
        if !heads_group && (default.is_empty() || answer.is_empty()) {
            wrong.push(format!("{limit}: has no default or no answer"));
        }
        let key = key.trim_matches('`');
        seen += 1;
        match tidegate::config::schema::find(key) {
            _ if key.is_empty() || of_models.contains(key) => {}
            None => wrong.push(format!("{limit}: there is no key '{key}'")),
            Some(known) if !default.starts_with(&format!("`{}`", known.default)) => {
                wrong.push(format!("{limit}: the default of '{key}' is `{}`", known.default));
            }
            Some(_) => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen > 60, "{seen} rows are not the whole table");
}
