//! A process that writes is killed, again and again, and goes on with the same log.
//!
//! `LEDGER_KILLS=500` is the long run.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use rand::RngExt as _;

use super::*;

/// Set in the process that is to be killed: the folder, and how it waits for its records.
const CHILD: &str = "TIDEGATE_TEST_LEDGER";
const SYNC: &str = "TIDEGATE_TEST_LEDGER_SYNC";
const KILLS: &str = "LEDGER_KILLS";
const THREADS: usize = 3;

fn settings_of(dir: &Path) -> LogSettings {
    LogSettings { segment_bytes: 256 << 10, ..settings(dir) }
}

/// Writes to the end of its days, and tells each record that it got an answer for.
fn child(dir: &Path, sync: bool) {
    // Not `println`, which the test's own output would swallow.
    let tell = |line: String| std::io::stdout().write_all(line.as_bytes()).unwrap();
    tell("\nbegin\n".to_owned());
    let (log, found) = open(&settings_of(dir));
    assert_eq!(found.damage, None);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (log, from) = (&log, found.next_seq);
            scope.spawn(move || {
                block_on(async {
                    for at in 0_usize.. {
                        let text = format!("{from}-{thread}-{at}");
                        let done = log.append(&draft(&text, 100 + at % 1000)).unwrap();
                        match sync {
                            true => log.synced(done).await.unwrap(),
                            false => log.written(done).await.unwrap(),
                        }
                        tell(format!("ack {} {text}\n", done.seq));
                    }
                });
            });
        }
    });
}

#[test]
fn a_kill_takes_nothing_that_had_an_answer() {
    if let Ok(dir) = std::env::var(CHILD) {
        return child(Path::new(&dir), std::env::var(SYNC).is_ok());
    }
    let kills = std::env::var(KILLS).map_or(20, |kills| kills.parse().unwrap());
    let this = "ledger::log::tests::kills::a_kill_takes_nothing_that_had_an_answer";
    for sync in [false, true] {
        let dir = TempDir::new().unwrap();
        let mut acked = HashMap::new();
        for _ in 0..kills {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", this]).env(CHILD, dir.path()).stdout(Stdio::piped());
            if sync {
                command.env(SYNC, "1");
            }
            let mut child = command.spawn().unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            assert!(lines.any(|line| line.unwrap() == "begin"));
            let reader = std::thread::spawn(move || lines.collect::<Vec<_>>());
            std::thread::sleep(Duration::from_micros(rand::rng().random_range(0..40_000)));
            child.kill().unwrap();
            child.wait().unwrap();
            for line in reader.join().unwrap() {
                let Ok(line) = line else { continue };
                // The last one may be cut.
                let Some((seq, text)) =
                    line.strip_prefix("ack ").and_then(|ack| ack.split_once(' '))
                else {
                    continue;
                };
                if text.split('-').count() == 3 {
                    let before = acked.insert(seq.parse::<u64>().unwrap(), text.to_owned());
                    assert_eq!(before, None, "number {seq} was given twice");
                }
            }
        }
        let (log, found) = open(&settings_of(dir.path()));
        assert_eq!(found.damage, None);
        block_on(log.close());
        let texts = texts(&settings_of(dir.path()));
        let missing =
            acked.iter().filter(|(seq, text)| !texts[**seq as usize].starts_with(&***text)).count();
        let mut times: HashMap<&str, usize> = HashMap::new();
        texts.iter().for_each(|text| *times.entry(text).or_default() += 1);
        let doubled = acked.values().filter(|text| times.get(&***text) > Some(&1)).count();
        eprintln!(
            "sync {sync}: {kills} kills, {} acked, {missing} missing, {doubled} doubled, {} records",
            acked.len(),
            texts.len()
        );
        assert_eq!((missing, doubled), (0, 0));
        assert!(acked.len() > kills, "there was something to lose");
    }
}
