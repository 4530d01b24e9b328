//! `tidegate check-config`: the configuration and every model's files, without serving.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use serde_json::json;

use crate::config::{self, ServeArgs};
use crate::control;
use crate::control::manifest::{self, Manifest, ManifestError};
use crate::control::source::Location;
use crate::domain::ModelName;

#[derive(clap::Args)]
#[command(after_help = "Example:\n  tidegate check-config --config tidegate.toml --strict\n\n\
                  Exit code: 0 right, 1 a model's files are wrong (or, with --strict, something \
                  is unsafe), 2 the configuration is wrong")]
pub(super) struct Args {
    #[command(flatten)]
    serve: ServeArgs,
    /// Exit 1 when something is unsafe
    #[arg(long)]
    strict: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What was found, in the order it is printed.
#[derive(Default)]
struct Findings {
    /// In the gateway's configuration.
    problems: Vec<String>,
    /// In the repository.
    model_problems: Vec<String>,
    unsafe_notes: Vec<String>,
    warnings: Vec<String>,
}

impl Findings {
    fn code(&self, strict: bool) -> u8 {
        if !self.problems.is_empty() {
            return 2;
        }
        u8::from(!self.model_problems.is_empty() || (strict && !self.unsafe_notes.is_empty()))
    }

    fn print(&self, as_json: bool, out: &mut impl Write) -> std::io::Result<()> {
        let problems: Vec<&String> = self.problems.iter().chain(&self.model_problems).collect();
        if as_json {
            let (notes, warnings) = (&self.unsafe_notes, &self.warnings);
            let ok = problems.is_empty();
            let value =
                json!({"ok": ok, "problems": problems, "unsafe": notes, "warnings": warnings});
            return writeln!(out, "{value:#}");
        }
        for problem in &problems {
            writeln!(out, "problem: {problem}")?;
        }
        for note in &self.unsafe_notes {
            writeln!(out, "unsafe: {note}")?;
        }
        for warning in &self.warnings {
            writeln!(out, "warning: {warning}")?;
        }
        match problems.len() {
            0 => writeln!(out, "the configuration is right"),
            1 => writeln!(out, "1 problem"),
            count => writeln!(out, "{count} problems"),
        }
    }
}

pub(super) fn run(args: &Args) -> ExitCode {
    let findings = check(&args.serve);
    match findings.print(args.json, &mut std::io::stdout().lock()) {
        Ok(()) => ExitCode::from(findings.code(args.strict)),
        Err(_) => ExitCode::FAILURE,
    }
}

fn check(args: &ServeArgs) -> Findings {
    let mut findings = Findings::default();
    match config::load(args) {
        Ok(config) => {
            findings.unsafe_notes.clone_from(&config.unsafe_notes);
            check_models(&config.control, &mut findings);
        }
        Err(problems) => findings.problems = problems.0.iter().map(ToString::to_string).collect(),
    }
    findings
}

/// The models of a folder; those that lie elsewhere are checked when they are loaded.
fn check_models(control: &control::Settings, findings: &mut Findings) {
    match (&control.source.location, control::sole_model(control)) {
        (Some(elsewhere @ (Location::Objects(_) | Location::Mlflow(_))), _) => {
            findings.warnings.push(format!(
                "the models of {elsewhere} are not checked here; 'tidegate models list' shows them"
            ));
        }
        (_, Some(model)) => note(&model, manifest::read_sole(&control.repository), findings),
        (_, None) => check_repository(&control.repository, findings),
    }
}

fn check_repository(repository: &Path, findings: &mut Findings) {
    let shown = repository.display();
    let entries = match std::fs::read_dir(repository) {
        Ok(entries) => entries,
        Err(error) => {
            let problem = format!("repository.path: '{shown}' cannot be read: {error}");
            return findings.model_problems.push(problem);
        }
    };
    let mut folders: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    folders.retain(|path| path.is_dir());
    folders.sort();
    for folder in folders {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        match name.parse::<ModelName>() {
            Ok(model) => note(&model, manifest::read(&folder), findings),
            Err(error) => {
                findings.warnings.push(format!("folder '{name}' is not served: {error}"));
            }
        }
    }
}

fn note(name: &ModelName, read: Result<Manifest, ManifestError>, findings: &mut Findings) {
    match read {
        Ok(manifest) => {
            let lines = manifest.warnings.iter().map(|line| format!("model {name}: {line}"));
            findings.warnings.extend(lines);
        }
        Err(error) => {
            let lines = error.problems.iter().map(|line| format!("model {name}: {line}"));
            findings.model_problems.extend(lines);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(config: &str) -> (tempfile::TempDir, ServeArgs) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("m/1")).unwrap();
        std::fs::write(folder.path().join("m/config.pbtxt"), config).unwrap();
        let path = folder.path().to_str().unwrap().to_owned();
        (folder, ServeArgs { model_repository: Some(path), ..ServeArgs::default() })
    }

    fn printed(findings: &Findings, as_json: bool) -> String {
        let mut out = Vec::new();
        findings.print(as_json, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_right_configuration_is_said_to_be() {
        let (_keep, args) = repository("max_batch_size: 4");
        let findings = check(&args);
        assert_eq!(findings.code(false), 0);
        assert_eq!(printed(&findings, false).lines().last(), Some("the configuration is right"));
    }

    #[test]
    fn models_that_lie_elsewhere_are_not_looked_for_in_a_folder() {
        for url in ["s3://models/prod", "mlflow+http://127.0.0.1:5000/?models=iris"] {
            let args = ServeArgs { model_repository: Some(url.to_owned()), ..ServeArgs::default() };
            let findings = check(&args);
            let text = printed(&findings, false);
            assert_eq!(findings.code(false), 0, "{text}");
            assert!(text.contains("are not checked here"), "{text}");
        }
    }

    #[test]
    fn a_models_problem_fails_the_check() {
        let (_keep, args) = repository("max_batch_size: -4 response_cache { enable: true }");
        let findings = check(&args);
        assert_eq!(findings.code(false), 1);
        assert!(printed(&findings, false).starts_with("problem: model m: config.pbtxt: max_batch"));
        let json: serde_json::Value = serde_json::from_str(&printed(&findings, true)).unwrap();
        assert_eq!(json["ok"], false);
    }

    #[test]
    fn a_repository_that_is_one_model_is_checked_as_such() {
        let (keep, args) = repository("");
        std::fs::write(keep.path().join("model.onnx"), "").unwrap();
        std::fs::write(keep.path().join("config.pbtxt"), "name: 'net' max_batch_size: -4").unwrap();
        assert_eq!(check(&args).code(false), 0, "a folder of models has no such file");
        let findings = check(&ServeArgs { model_name: Some("iris".to_owned()), ..args });
        assert_eq!(findings.model_problems.len(), 1, "the name in the file is not held against it");
        assert!(findings.model_problems[0].starts_with("model iris: config.pbtxt: max_batch_size"));
    }

    #[test]
    fn unsafe_choices_fail_only_when_strict() {
        let (_keep, args) = repository("");
        let args = ServeArgs {
            http_address: Some("0.0.0.0:8000".to_owned()),
            allow_unauthenticated: true,
            ..args
        };
        let findings = check(&args);
        assert_eq!((findings.code(false), findings.code(true)), (0, 1));
    }

    #[test]
    fn a_wrong_configuration_is_wrong_usage() {
        let (_keep, args) = repository("");
        let args = ServeArgs { engine: Some("torch".to_owned()), ..args };
        assert_eq!(check(&args).code(false), 2);
    }
}
