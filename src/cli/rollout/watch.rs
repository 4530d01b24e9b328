//! A rollout, followed to its end.
//!
//! ```text
//! server-sent events of the model ─▶ look now ─┐
//!                                              ├─▶ GET the rollout ─▶ redraw, or a line
//! every POLL_EVERY ────────────────────────────┘        │
//!                                                       ▼ it has ended: exit code
//! ```
//!
//! The events only say when to look: without them (too many readers, a proxy that holds them back)
//! it polls, and nothing is missed.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};

use super::view;
use crate::cli::admin::{Client, Stop, finish};
use crate::domain::ModelName;

const POLL_EVERY: Duration = Duration::from_secs(2);
/// Looks are not closer together than this, however fast events come.
const LOOK_MIN: Duration = Duration::from_millis(200);
/// A gateway that is away for longer (a restart takes seconds) ends the watch.
const AWAY_MAX: Duration = Duration::from_secs(60);
/// Before events are asked for again.
const EVENTS_AGAIN: Duration = Duration::from_secs(10);

/// Own screen, and back from it: what was on the terminal before stays.
const SCREEN_OPEN: &str = "\x1b[?1049h";
const SCREEN_CLOSE: &str = "\x1b[?1049l";
const SCREEN_CLEAR: &str = "\x1b[H\x1b[2J";

/// How the watch ended.
enum End {
    Rollout(Value),
    /// Somebody pressed Ctrl-C; the rollout goes on.
    Left,
}

/// Exit code 0 when the candidate was promoted, 1 otherwise.
pub(super) fn run(client: &Client, model: &ModelName, id: &str, as_json: bool) -> ExitCode {
    let out = io::stdout();
    let screen = out.is_terminal() && !as_json;
    let mut shown = Shown { last: String::new(), screen, as_json };
    shown.open();
    let ended = client.run(async {
        tokio::select! {
            ended = follow(client, model, id, &mut shown) => ended.map(End::Rollout),
            _ = tokio::signal::ctrl_c() => Ok(End::Left),
        }
    });
    shown.close();
    match ended {
        Ok(End::Rollout(rollout)) => {
            if screen {
                // What is left on the terminal.
                if let Err(error) = write!(out.lock(), "{}", view::text(&rollout)) {
                    return finish(Err(Stop::failed(error)));
                }
            }
            if view::promoted(&rollout) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Ok(End::Left) => finish(Err(Stop::failed("not watched any more, the rollout goes on"))),
        Err(stop) => finish(Err(stop)),
    }
}

async fn follow(
    client: &Client,
    model: &ModelName,
    id: &str,
    shown: &mut Shown,
) -> Result<Value, Stop> {
    let path = format!("/models/{model}/rollouts/{id}");
    let mut events = Events { stream: None, again: Instant::now() };
    let mut away_since = None;
    loop {
        match client.get_async(&path).await {
            Ok(answer) => {
                away_since = None;
                shown.show(&answer.body)?;
                if view::ended(&answer.body) {
                    return Ok(answer.body);
                }
            }
            // The first look decides whether there is something to watch at all.
            Err(stop) if shown.last.is_empty() => return Err(stop),
            Err(stop) => {
                let since = *away_since.get_or_insert_with(Instant::now);
                if since.elapsed() > AWAY_MAX {
                    return Err(stop);
                }
                events.stream = None;
            }
        }
        events.wait(client).await;
    }
}

/// The stream of events, when there is one.
struct Events {
    stream: Option<reqwest::Response>,
    /// When to ask for one again.
    again: Instant,
}

impl Events {
    /// Until something happened, or it is time to look anyway.
    async fn wait(&mut self, client: &Client) {
        sleep(LOOK_MIN).await;
        if self.stream.is_none() && Instant::now() >= self.again {
            self.again = Instant::now() + EVENTS_AGAIN;
            // Without them there is the clock.
            self.stream = timeout(POLL_EVERY, client.events(None)).await.ok().and_then(Result::ok);
        }
        let Some(stream) = &mut self.stream else { return sleep(POLL_EVERY).await };
        match timeout(POLL_EVERY, stream.chunk()).await {
            // Whatever it says: look.
            Ok(Ok(Some(_))) | Err(_) => {}
            Ok(Ok(None) | Err(_)) => self.stream = None,
        }
    }
}

/// What has been printed.
struct Shown {
    last: String,
    screen: bool,
    as_json: bool,
}

impl Shown {
    fn open(&self) {
        if self.screen {
            print(SCREEN_OPEN).unwrap_or_default();
        }
    }

    fn close(&self) {
        if self.screen {
            print(SCREEN_CLOSE).unwrap_or_default();
        }
    }

    /// Redraws a terminal; elsewhere a line for each change.
    fn show(&mut self, rollout: &Value) -> Result<(), Stop> {
        let text = match (self.as_json, self.screen) {
            (true, _) => format!("{rollout}\n"),
            (false, true) => view::text(rollout),
            (false, false) => format!("{}\n", view::line(rollout)),
        };
        if text == self.last {
            return Ok(());
        }
        let clear = if self.screen { SCREEN_CLEAR } else { "" };
        print(&format!("{clear}{text}")).map_err(Stop::failed)?;
        self.last = text;
        Ok(())
    }
}

fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
