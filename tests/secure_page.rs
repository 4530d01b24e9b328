//! `docs/secure.md`, executed: every command of the page, one after the other, as a reader would.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

/// The page's commands.
fn commands(page: &str) -> String {
    let blocks = page.split("\n```sh\n").skip(1);
    blocks.map(|block| block.split("\n```").next().unwrap()).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_command_of_the_page_runs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/secure.md")).unwrap();
    // Ports of this test's own.
    let held: Vec<_> = (0..4).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let ports: Vec<_> = held.iter().map(|held| held.local_addr().unwrap().port()).collect();
    drop(held);
    let mut script = commands(&page);
    for (at, port) in ports.iter().enumerate() {
        script = script.replace(&format!(":{}", 8000 + at), &format!(":{port}"));
    }
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(root.join("models"), folder.path().join("models")).unwrap();
    let script =
        format!("trap 'kill $(jobs -p) 2> /dev/null || true' EXIT\nset -euo pipefail\n{script}\n");
    let program = Path::new(env!("CARGO_BIN_EXE_tidegate")).parent().unwrap();
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
    let names = ["HTTP", "GRPC", "METRICS", "ADMIN"].iter().zip(&ports);
    let addresses = names.map(|(name, port)| {
        (format!("TIDEGATE_SERVER_{name}_ADDRESS"), format!("127.0.0.1:{port}"))
    });
    let output = Command::new("bash")
        .args(["-c", &script])
        .current_dir(folder.path())
        .env("PATH", path)
        .env("TIDEGATE_ENGINE_ENGINE", "tract")
        .envs(addresses)
        .output()
        .unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let log = std::fs::read_to_string(folder.path().join("gateway.log")).unwrap_or_default();
    assert!(output.status.success(), "{}\n{out}\n{err}\n{log}", output.status);
    // What the page says about it.
    for said in [
        "shop         predictor  iris    live",
        "'Authorization: Bearer <token>'\"}401\n",
        "the token was revoked\"}401\n",
        "\n{\"models\":[\"iris\"]}",
        "model: iris\n",
        "\"action\":\"keys.revoke\"",
        "\"reason\":\"replaced\"",
        "the configuration is right\n",
        "certificates changed",
        "{\"live\":true,\"ready\":true}",
        "\"name\":\"iris\"",
    ] {
        assert!(out.contains(said), "not said: {said}\n{out}\n{err}");
    }
    // Nothing that was printed or logged holds a token's secret.
    for name in ["shop.token", "next.token", "you.token", "state/admin-token"] {
        let token = std::fs::read_to_string(folder.path().join(name)).unwrap();
        let (_, secret) = token.trim_end().split_once('.').unwrap();
        for text in [&out, &err, &log.as_str().into()] {
            assert!(!text.contains(secret), "{name}");
        }
    }
}
