use std::io::Write as _;

use super::*;
use crate::domain::EngineChoice;

fn from_file(
    text: &str,
    environment: &[(&str, &str)],
    mut args: ServeArgs,
) -> Result<Config, Problems> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    args.config = Some(file.path().to_owned());
    let environment =
        environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    load_from(&args, environment)
}

fn paths(result: Result<Config, Problems>) -> Vec<String> {
    result.unwrap_err().0.into_iter().map(|problem| problem.path).collect()
}

#[test]
fn nothing_said_gives_the_documented_defaults() {
    let config = load_from(&ServeArgs::default(), std::iter::empty()).unwrap();
    assert_eq!(config.http.to_string(), "127.0.0.1:8000");
    assert_eq!(config.control.repository, PathBuf::from("models"));
    assert_eq!(config.control.probe, control::ProbeLimits::default());
    assert_eq!(config.drain_grace, Duration::from_secs(30));
    assert_eq!(config.gateway.timeout_max, gateway::Settings::default().timeout_max);
    assert_eq!(format!("{:?}", config.transport), format!("{:?}", transport::Settings::default()));
    assert_eq!(config.observe.otlp, None);
    assert!(config.observe.triton_metrics);
    assert_eq!(config.unsafe_notes, Vec::<String>::new());
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let file = "[server]\nhttp_address = '127.0.0.1:1'\ngrpc_address = '127.0.0.1:2'\nmetrics_address = '127.0.0.1:3'\n";
    let environment = [
        ("TIDEGATE_SERVER_HTTP_ADDRESS", "127.0.0.1:11"),
        ("TIDEGATE_SERVER_GRPC_ADDRESS", "127.0.0.1:12"),
    ];
    let args = ServeArgs {
        http_address: Some("localhost:21".to_owned()),
        engine: Some("tract".to_owned()),
        ..ServeArgs::default()
    };
    let config = from_file(file, &environment, args).unwrap();
    assert_eq!(config.http.port(), 21);
    assert_eq!(config.grpc.port(), 12);
    assert_eq!(config.metrics.port(), 3);
    assert_eq!(config.control.engine, EngineChoice::Tract);
}

#[test]
fn every_problem_is_named_at_once() {
    let file = "
        nonsense = 1
        [server]
        http_address = 'nowhere'
        htp_address = '127.0.0.1:1'
        drain_grace_ms = -1
        [engine]
        engine = 'torch'
        [auth]
        data = 'sometimes'
        [telemetry]
        sample_ratio = 2.0
    ";
    let environment = [("TIDEGATE_SERVER_BODY_MAX_BYTES", "lots")];
    let mut got = paths(from_file(file, &environment, ServeArgs::default()));
    got.sort();
    let expected = [
        "auth.data",
        "engine.engine",
        "nonsense",
        "server.body_max_bytes",
        "server.drain_grace_ms",
        "server.htp_address",
        "server.http_address",
        "telemetry.sample_ratio",
    ];
    assert_eq!(got, expected);
}

#[test]
fn an_open_listener_needs_consent() {
    let open = |allow_unauthenticated| ServeArgs {
        http_address: Some("0.0.0.0:8000".to_owned()),
        allow_unauthenticated,
        ..ServeArgs::default()
    };
    assert_eq!(paths(from_file("", &[], open(false))), ["server.http_address"]);
    let config = from_file("[auth]\ndata = 'required'", &[], open(false)).unwrap();
    assert!(config.transport.auth.required);
    let config = from_file("", &[], open(true)).unwrap();
    assert!(!config.transport.auth.required);
    assert!(config.unsafe_notes.iter().any(|note| note.contains("0.0.0.0:8000")));
}

/// A folder with a certificate, its key, and what is neither.
fn certificates() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["gateway".to_owned()]).unwrap();
    let cert = params.self_signed(&key).unwrap();
    std::fs::write(folder.path().join("cert.pem"), cert.pem()).unwrap();
    std::fs::write(folder.path().join("key.pem"), key.serialize_pem()).unwrap();
    std::fs::write(folder.path().join("other.pem"), "hello").unwrap();
    folder
}

#[test]
fn certificates_are_read_with_the_configuration() {
    let folder = certificates();
    let at = folder.path().display();
    let pair = format!("tls_cert = '{at}/cert.pem'\ntls_key = '{at}/key.pem'\n");
    let ca = format!("client_ca = '{at}/cert.pem'\n");
    let all = format!(
        "[server]\n{pair}[admin]\n{pair}{ca}clients = 'cn:alice = admin; dns:ci = deployer a-*'"
    );
    let config = from_file(&all, &[], ServeArgs::default()).unwrap();
    assert!(config.transport.tls.is_some() && config.admin_tls.is_some());
    assert!(!config.admin_clients.is_empty());
    let cases = [
        (format!("[server]\ntls_cert = '{at}/cert.pem'"), "server.tls_key"),
        (format!("[admin]\ntls_key = '{at}/key.pem'"), "admin.tls_cert"),
        (
            format!("[server]\ntls_cert = '{at}/other.pem'\ntls_key = '{at}/key.pem'"),
            "server.tls_cert",
        ),
        (
            format!("[server]\ntls_cert = '{at}/cert.pem'\ntls_key = '{at}/none.pem'"),
            "server.tls_cert",
        ),
        (format!("[admin]\n{pair}client_ca = '{at}/other.pem'"), "admin.tls_cert"),
        (format!("[admin]\n{ca}"), "admin.client_ca"),
        (format!("[admin]\n{pair}clients = 'cn:alice = admin'"), "admin.clients"),
        (format!("[admin]\n{pair}{ca}clients = 'cn:alice = root'"), "admin.clients"),
    ];
    for (file, path) in cases {
        assert_eq!(paths(from_file(&file, &[], ServeArgs::default())), [path], "{file}");
    }
}

#[test]
fn keys_without_encryption_are_named_as_unsafe() {
    let folder = certificates();
    let at = folder.path().display();
    let notes = |server: &str| {
        let file = format!(
            "[auth]\ndata = 'required'\n[repository]\nmodel_control = true\n[server]\n\
             http_address = '0.0.0.0:8000'\n{server}"
        );
        from_file(&file, &[], ServeArgs::default()).unwrap().unsafe_notes
    };
    let plain = notes("");
    assert_eq!(plain.len(), 1, "{plain:?}");
    assert!(plain[0].starts_with("server.http_address: 0.0.0.0:8000 takes keys"), "{plain:?}");
    let pair = format!("tls_cert = '{at}/cert.pem'\ntls_key = '{at}/key.pem'\n");
    assert_eq!(notes(&pair), Vec::<String>::new());
    let metrics = notes(&format!("{pair}metrics_address = '0.0.0.0:8002'"));
    assert_eq!(
        metrics,
        ["server.metrics_address: 0.0.0.0:8002 is open to everyone who can reach it"]
    );
}

#[test]
fn one_port_is_not_taken_twice() {
    let args =
        ServeArgs { grpc_address: Some("127.0.0.1:8000".to_owned()), ..ServeArgs::default() };
    assert_eq!(paths(from_file("", &[], args)), ["server.grpc_address"]);
    let any = "[server]\nhttp_address = '127.0.0.1:0'\ngrpc_address = '127.0.0.1:0'";
    assert!(from_file(any, &[], ServeArgs::default()).is_ok());
}

#[test]
fn broken_toml_and_a_missing_file_are_problems() {
    assert_eq!(from_file("[server", &[], ServeArgs::default()).unwrap_err().0.len(), 1);
    let args =
        ServeArgs { config: Some("/nonexistent/tidegate.toml".into()), ..ServeArgs::default() };
    let problems = load_from(&args, std::iter::empty()).unwrap_err();
    assert!(problems.to_string().contains("cannot be read"), "{problems}");
}

#[test]
fn foreign_variables_are_noted_and_harmless() {
    let environment = [("TIDEGATE_SERVICE_HOST", "10.0.0.1"), ("PATH", "/bin")];
    let config = from_file("", &environment, ServeArgs::default()).unwrap();
    assert_eq!(config.unsafe_notes.len(), 1);
}

/// Rows of the documentation's table of keys: name, variable, default.
fn documented() -> Vec<(String, String, String)> {
    let page = include_str!("../../docs/configuration.md");
    let cell = |text: &str| text.trim().trim_matches('`').to_owned();
    page.lines()
        .filter(|line| line.contains("`TIDEGATE_"))
        .filter_map(|line| {
            let cells: Vec<&str> = line.strip_prefix('|')?.split('|').collect();
            Some((cell(cells.first()?), cell(cells.get(1)?), cell(cells.get(2)?)))
        })
        .collect()
}

#[test]
fn the_documentation_has_every_key_and_no_other() {
    let expected: Vec<(String, String, String)> = schema::KEYS
        .iter()
        .map(|key| (key.path.to_owned(), schema::variable(key.path), key.default.to_owned()))
        .collect();
    assert_eq!(documented(), expected);
}

#[test]
fn hooks_need_an_address_that_is_safe_and_a_key_that_is_elsewhere() {
    let read = |text: &str| from_file(text, &[], ServeArgs::default());
    assert!(read("").unwrap().hooks.is_none());
    let good = "[hooks]\nurl = 'https://ci.example/hooks'\nsecret = 'env:KEY'\ntimeout_ms = 700\n";
    let hooks = read(good).unwrap().hooks.unwrap();
    assert_eq!(hooks.url.as_str(), "https://ci.example/hooks");
    let outbound = &hooks.outbound;
    assert_eq!((outbound.timeout.as_millis(), outbound.attempts_max), (700, 8));
    assert_eq!(hooks.queue_max, 256);
    assert_eq!(paths(read("[hooks]\nurl = 'https://ci.example/'\n")), ["hooks.secret"]);
    let plain = "[hooks]\nurl = 'http://ci.example/'\nsecret = 'hunter2hunter2hunter2'\n";
    let problems = read(plain).unwrap_err();
    assert!(!problems.to_string().contains("hunter2"), "{problems}");
    assert_eq!(problems.0.len(), 2);
    assert_eq!(read("[hooks]\nsecret = 'env:KEY'\n").unwrap().unsafe_notes.len(), 1);
}

#[test]
fn models_may_come_from_elsewhere() {
    let file = "
        [repository]
        path = 'mlflow+http://ml.example.com:5000/?models=iris'
        poll_ms = 500
        allowed_hosts = 'minio.example.com:9000, [::1]:80'
        store_endpoint = 'https://minio.example.com:9000'
        store_key_id = 'env:KEY_ID'
        store_secret = 'file:/run/secrets/key'
        mlflow_username = 'env:ML_USER'
        mlflow_password = 'env:ML_PASSWORD'
        mlflow_stable_alias = 'champion'
        mlflow_artifacts = 's3://models/prod,gs://others'
        trusted_keys = 'RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3'
    ";
    let config = from_file(file, &[], ServeArgs::default()).unwrap();
    let source = &config.control.source;
    let location = source.location.as_ref().unwrap().to_string();
    assert_eq!(location, "mlflow+http://ml.example.com:5000/?models=iris");
    assert_eq!(source.poll, Duration::from_millis(500));
    assert_eq!(source.quiet, Duration::from_secs(2));
    assert_eq!(source.allowed_hosts.len(), 2);
    assert_eq!(source.mlflow.artifacts.len(), 2);
    assert!(!config.control.trusted_keys.is_empty());
    assert!(config.unsafe_notes[0].contains("without TLS"), "{:?}", config.unsafe_notes);
    let folder = from_file("[repository]\npath = 'file:///srv/models'", &[], ServeArgs::default());
    assert_eq!(folder.unwrap().control.repository, PathBuf::from("/srv/models"));
}

#[test]
fn a_secret_in_the_wrong_place_is_not_repeated() {
    let file = "
        [repository]
        path = 's3://AKIA:hunter2@bucket'
        trusted_keys = 'nonsense'
        allowed_hosts = 'minio'
        store_endpoint = 'https://u:hunter2@minio:9000'
        store_key_id = 'file:/run/id'
        store_token = 'hunter2'
        mlflow_password = 'hunter2'
        mlflow_stable_alias = '7'
        mlflow_token = 'hunter2'
        mlflow_artifacts = 'file:///etc'
    ";
    let problems = from_file(file, &[], ServeArgs::default()).unwrap_err();
    assert!(!problems.to_string().contains("hunter2"), "{problems}");
    let mut got = paths(Err(problems));
    got.sort();
    got.dedup();
    let expected = [
        "repository.allowed_hosts",
        "repository.mlflow_artifacts",
        "repository.mlflow_password",
        "repository.mlflow_stable_alias",
        "repository.mlflow_token",
        "repository.path",
        "repository.store_endpoint",
        "repository.store_key_id",
        "repository.store_token",
        "repository.trusted_keys",
    ];
    assert_eq!(got, expected);
}

#[test]
fn receivers_of_alerts_are_tables_with_the_defaults_of_their_kind() {
    use crate::control::alerts::condition::{Kind, Severity};
    use crate::control::alerts::receiver::Target;
    let file = r#"
        [alerts]
        for_s = 0
        nan_max = 1.0
        [[alerts.receivers]]
        name = 'ops'
        kind = 'cloudevents'
        url = 'http://127.0.0.1:9/in'
        secret = 'env:KEY'
        [[alerts.receivers]]
        name = 'gl'
        kind = 'gitlab'
        project = 'ml/loans'
        secret = 'file:/run/x'
        models = ['loans', 'risk-*']
        kinds = ['drift']
        severity_min = 'warning'
        repeat_s = 60
        parameters = { MODEL = '{model}', BRANCH = 'main' }
        [[alerts.quality]]
        metric = 'accuracy'
        min = 1
        days = 7
    "#;
    let alerts = from_file(file, &[], ServeArgs::default()).unwrap().alerts;
    let [ops, gitlab] = &alerts.receivers[..] else { panic!("{alerts:?}") };
    assert_eq!((ops.kinds.as_slice(), ops.resolved), (&Kind::ALL[..], true));
    assert_eq!((ops.repeat.as_secs(), ops.cooldown.as_secs()), (86_400, 0));
    assert_eq!((gitlab.kinds.as_slice(), gitlab.resolved), (&[Kind::Drift][..], false));
    assert_eq!((gitlab.repeat.as_secs(), gitlab.cooldown.as_secs()), (60, 86_400));
    assert_eq!(gitlab.severity_min, Severity::Warning);
    let loans: ModelName = "loans".parse().unwrap();
    assert!(gitlab.models.as_ref().unwrap().matches(&loans) && ops.models.is_none());
    let Target::GitLab { url, project, branch, parameters } = &gitlab.target else { panic!() };
    assert_eq!((url.as_str(), &**project, &**branch), ("https://gitlab.com/", "ml/loans", "main"));
    assert_eq!((parameters.len(), &*parameters["MODEL"]), (2, "{model}"));
    assert_eq!((alerts.limits.quality[0].min, alerts.limits.quality[0].days), (Some(1.0), Some(7)));
    assert!(!alerts.limits.odd_max.contains_key("nan") && alerts.limits.odd_max.len() == 4);
    // The same from the environment.
    let text = "[{name = 'a', kind = 'github', repository = 'o/r', secret = 'env:T'}]";
    let environment = [("TIDEGATE_ALERTS_RECEIVERS", text)];
    let alerts = from_file("", &environment, ServeArgs::default()).unwrap().alerts;
    assert!(matches!(&alerts.receivers[0].target, Target::GitHub { owner, .. } if owner == "o"));
    let smuggled = [("TIDEGATE_ALERTS_RECEIVERS", "[]\nmore = 1")];
    assert_eq!(paths(from_file("", &smuggled, ServeArgs::default())), ["alerts.receivers"]);
}

#[test]
fn problems_of_receivers_are_named_and_their_secrets_are_not() {
    let file = r#"
        [[alerts.receivers]]
        name = 'a b'
        kind = 'cloudevents'
        url = 'http://ops.example/'
        secret = 'hunter2hunter2hunter2'
        reslved = true
        [[alerts.receivers]]
        name = 'twice'
        kind = 'github'
        repository = 'acme'
        secret = 5
        kinds = ['drifts']
        cooldown_s = 99999999
        [[alerts.receivers]]
        kind = 'jenkins'
        url = 'https://ci.example/job/x'
        secret = 'env:T'
        parameters = { A = '{modell}', B = 7 }
        severity_min = 'bad'
        models = ['[']
        [[alerts.receivers]]
        name = 'x'
        kind = 'pager'
        secret = 'env:T'
        [[alerts.receivers]]
        name = 'same'
        kind = 'kubeflow'
        url = 'https://kf.example/'
        pipeline_id = 'p'
        secret = 'env:T'
        [[alerts.receivers]]
        name = 'same'
        kind = 'kubeflow'
        url = 'https://kf.example/'
        pipeline_id = 'p'
        secret = 'env:T'
        [[alerts.quality]]
        metric = 'accuracy'
        days = 0
    "#;
    let problems = from_file(file, &[], ServeArgs::default()).unwrap_err();
    let text = problems.to_string();
    assert!(!text.contains("hunter2"), "{text}");
    let at = |path: &str| problems.0.iter().any(|problem| problem.path == path);
    for path in [
        "alerts.receivers[0].name",
        "alerts.receivers[0].url",
        "alerts.receivers[0].secret",
        "alerts.receivers[0].reslved",
        "alerts.receivers[1].repository",
        "alerts.receivers[1].secret",
        "alerts.receivers[1].kinds",
        "alerts.receivers[1].cooldown_s",
        "alerts.receivers[2].name",
        "alerts.receivers[2].user",
        "alerts.receivers[2].parameters",
        "alerts.receivers[2].severity_min",
        "alerts.receivers[2].models",
        "alerts.receivers[3].kind",
        "alerts.receivers[5].name",
        "alerts.quality[0].min",
        "alerts.quality[0].days",
    ] {
        assert!(at(path), "{path} is not in\n{text}");
    }
    let many = "[[alerts.receivers]]\nname = 'a'\n".repeat(17);
    let text = from_file(&many, &[], ServeArgs::default()).unwrap_err().to_string();
    assert!(text.contains("at most 16 receivers, got 17"), "{text}");
    let wrong = paths(from_file("[alerts]\nreceivers = 'x'\n", &[], ServeArgs::default()));
    assert_eq!(wrong, ["alerts.receivers"]);
}
