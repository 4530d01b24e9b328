//! The program itself under limits of the system: too few descriptors or threads, and more bytes
//! than it may hold.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::alone;

const BINARY: &str = env!("CARGO_BIN_EXE_tidegate");
/// A busy machine starts programs slowly.
const PATIENCE: Duration = Duration::from_secs(60);

/// The gateway as a child process, ended with the test.
struct Gateway {
    child: Child,
    log: std::path::PathBuf,
}

impl Gateway {
    /// `limits` is a program and its arguments that the gateway is started by.
    fn start(root: &Path, limits: &[&str], settings: &[(&str, &str)]) -> Self {
        let log = root.join("log");
        let mut command = Command::new(limits[0]);
        command.args(&limits[1..]).args([BINARY, "serve"]).envs(settings.iter().copied());
        for name in ["HTTP", "GRPC", "METRICS", "ADMIN"] {
            command.env(format!("TIDEGATE_SERVER_{name}_ADDRESS"), "127.0.0.1:0");
        }
        command
            .env("TIDEGATE_REPOSITORY_PATH", root.join("models"))
            .env("TIDEGATE_SERVER_STATE_DIR", root.join("state"))
            // The models were written just now, whole.
            .env("TIDEGATE_REPOSITORY_QUIET_MS", "0")
            .env("TIDEGATE_SERVER_DRAIN_NOTICE_MS", "0")
            .env("RUST_BACKTRACE", "0")
            .stderr(std::fs::File::create(&log).unwrap())
            .stdout(Stdio::null());
        Self { child: command.spawn().unwrap(), log }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until the log holds `text`, or the program has ended.
    fn until(&mut self, text: &str) -> Option<ExitStatus> {
        let start = Instant::now();
        loop {
            let ended = self.child.try_wait().unwrap();
            if ended.is_some() || self.log().contains(text) {
                return ended;
            }
            assert!(start.elapsed() < PATIENCE, "neither ready nor gone:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn address(&self, protocol: &str) -> SocketAddr {
        let log = self.log();
        let line = log.lines().find(|line| line.contains(&format!("protocol=\"{protocol}\"")));
        line.unwrap().split_once("address=").unwrap().1.trim().parse().unwrap()
    }

    /// Peak of its resident memory, in MiB.
    fn peak_mib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Without models, which are tried in children of their own.
fn empty_root() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("models")).unwrap();
    root
}

/// Starts under a limit and says what came of it: `true` when it became ready.
fn starts(root: &Path, limits: &[&str], refusals: &[&str], told: &mut String) -> bool {
    let mut gateway = Gateway::start(root, limits, &[]);
    let ended = gateway.until(": ready");
    let log = gateway.log();
    assert!(!log.contains("panicked"), "{limits:?}:\n{log}");
    let said = log.lines().last().unwrap_or_default();
    if let Some(status) = ended {
        assert!(!status.success(), "{limits:?}: {log}");
        assert!(refusals.iter().any(|refusal| log.contains(refusal)), "{limits:?}:\n{log}");
        writeln!(told, "C19 {limits:?}: {status}: {said}").unwrap();
    } else {
        writeln!(told, "C19 {limits:?}: ready").unwrap();
    }
    ended.is_none()
}

/// Under a limit it says what is missing and ends with an error, or is ready: nothing in between.
#[test]
fn too_few_descriptors_are_a_clear_error() {
    alone(|_| {
        let root = empty_root();
        let refusals = ["Too many open files", "Error 24", "os error 24"];
        let (mut told, mut ready) = (String::new(), Vec::new());
        for count in [3, 4, 5, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 24, 128] {
            let limit = format!("--nofile={count}");
            ready.push(starts(root.path(), &["prlimit", &limit], &refusals, &mut told));
        }
        eprint!("{told}");
        assert_eq!(ready.first(), Some(&false));
        assert_eq!(ready.last(), Some(&true));
    });
}

/// The limit on processes does not bind root, so it becomes someone else where it can.
#[test]
fn too_few_threads_are_a_clear_error() {
    alone(|_| {
        let root = empty_root();
        let other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
        let mine = Command::new(other[0]).args(&other[1..]).args([BINARY, "--version"]).output();
        let is_root = mine.is_ok_and(|output| output.status.success());
        let counts: &[usize] = if is_root { &[1, 2, 3, 4, 5, 6, 64] } else { &[1] };
        if is_root {
            open_to_all(root.path());
        }
        let refusals = ["Resource temporarily unavailable"];
        let (mut told, mut ready) = (String::new(), Vec::new());
        for count in counts {
            let limit = format!("--nproc={count}");
            let mut limits = if is_root { other.to_vec() } else { Vec::new() };
            limits.extend(["prlimit", &limit]);
            ready.push(starts(root.path(), &limits, &refusals, &mut told));
        }
        eprint!("{told}");
        assert_eq!(ready.first(), Some(&false));
        assert!(!is_root || ready.last() == Some(&true));
    });
}

fn open_to_all(folder: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o777)).unwrap();
}

#[test]
fn a_repository_that_is_not_there_is_an_error() {
    alone(|_| {
        let root = tempfile::tempdir().unwrap();
        let mut gateway = Gateway::start(root.path(), &["env"], &[]);
        let ended = gateway.until(": ready");
        let log = gateway.log();
        assert!(ended.is_some_and(|status| status.code() == Some(1)), "{ended:?}:\n{log}");
        assert!(log.contains("read the model repository"), "{log}");
    });
}

const BODY_MIB: usize = 16;
const CALLERS: usize = 32;
const HELD_MAX_MIB: u64 = 64;

/// Half a gigabyte of bodies at once for a gateway that may hold 64 MiB.
#[test]
fn large_bodies_are_shed_rather_than_held() {
    alone(|_| {
        let root = empty_root();
        let held = (HELD_MAX_MIB << 20).to_string();
        let settings = [("TIDEGATE_SERVER_IN_FLIGHT_BYTES_MAX", held.as_str())];
        let mut gateway = Gateway::start(root.path(), &["env"], &settings);
        assert_eq!(gateway.until(": ready"), None);
        let address = gateway.address("http");
        let before = gateway.peak_mib();
        let statuses: Vec<u16> = std::thread::scope(|scope| {
            let calls: Vec<_> = (0..CALLERS).map(|_| scope.spawn(move || send(address))).collect();
            calls.into_iter().map(|call| call.join().unwrap()).collect()
        });
        let peak = gateway.peak_mib();
        let shed = statuses.iter().filter(|status| **status == 503).count();
        eprintln!(
            "C17: {CALLERS} bodies of {BODY_MIB} MiB at once, {HELD_MAX_MIB} MiB may be held: {shed} \
             shed; resident peak {before} MiB before, {peak} MiB after"
        );
        // The others came in, and are no JSON.
        assert!(statuses.iter().all(|status| [503, 400].contains(status)), "{statuses:?}");
        assert!(shed > 0, "{statuses:?}");
        assert!(peak < before + 3 * HELD_MAX_MIB, "{peak} MiB");
        assert_eq!(send(address), 400, "room again");
    });
}

/// Sends a large body, slowly enough for all to be there at once; gives the answer's status.
fn send(address: SocketAddr) -> u16 {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let size = BODY_MIB << 20;
    let head = format!(
        "POST /v2/models/none/infer HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {size}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    let chunk = vec![b' '; size / 64];
    for _ in 0..64 {
        if stream.write_all(&chunk).is_err() {
            break; // Refused before all of it was sent.
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut start = [0; 12];
    match stream.read_exact(&mut start) {
        Ok(()) => std::str::from_utf8(&start[9..]).unwrap().parse().unwrap(),
        Err(error) => panic!("no answer: {error}"),
    }
}
