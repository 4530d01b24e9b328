//! Drives a load against one address and reports what came back.
//!
//! Each client thread has a runtime of its own and its share of the connections and arrivals; they
//! share nothing until the end.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;

use crate::client::{Call, Caller, Connection};
use crate::process::{self, Process};
use crate::record::{Record, Report, Usage, Window};
use crate::schedule::{self, Arrivals};

/// Pause of a caller whose call failed, so that a server that is down is not flooded.
const FAILURE_PAUSE: Duration = Duration::from_millis(5);
/// Time to open all connections before the load starts.
const START_DELAY: Duration = Duration::from_millis(20);

/// When requests are sent.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// Each caller sends when its last request is answered.
    Closed,
    /// At `rate` per second, whatever the server does; callers that are all busy make it late.
    Open { rate: f64, arrivals: Arrivals, seed: u64 },
}

/// How much load.
#[derive(Clone, Debug)]
pub struct Load {
    pub pace: Pace,
    pub connections: usize,
    pub streams_per_connection: usize,
    pub threads: usize,
    pub warmup: Duration,
    pub length: Duration,
    pub timeout: Duration,
}

/// Sends `call` to `address` as `load` says, and measures `server`.
///
/// # Errors
/// When the load makes no sense or the first request fails.
pub fn run(
    address: SocketAddr,
    call: &Call,
    load: &Load,
    server: Option<Process>,
) -> Result<Report> {
    let streams = load.streams_per_connection;
    ensure!(
        load.connections > 0 && streams > 0 && load.threads > 0,
        "a load needs connections, streams and threads"
    );
    ensure!(!load.length.is_zero(), "a load needs a length");
    ensure!(
        streams == 1 || call.protocol.multiplexes(),
        "HTTP/1.1 carries one request at a time: use more connections instead of streams"
    );
    let answer_bytes = first(address, call, load.timeout)?;
    let start = Instant::now() + START_DELAY;
    let window = Window { start: start + load.warmup, end: start + load.warmup + load.length };
    let threads = load.threads.min(load.connections);
    let own = Process::new(std::process::id())?;
    let mut record = Record::default();
    let used = std::thread::scope(|scope| -> Result<Used> {
        let mut clients = Vec::new();
        for index in 0..threads {
            let share = Share { address, call, load, start, window, index, threads };
            clients.push(scope.spawn(move || share.run()));
        }
        let measured = measure(window, server, own);
        for client in clients {
            let part = client.join().map_err(|_| anyhow::anyhow!("a client thread panicked"))??;
            record.add(&part);
        }
        measured
    })?;
    Ok(report(&record, load, &used, (call.body.len(), answer_bytes)))
}

/// The first answer, before any load: whether it works at all, and how long answers are.
///
/// # Errors
/// When it is no success.
pub fn first(address: SocketAddr, call: &Call, timeout: Duration) -> Result<usize> {
    runtime()?.block_on(async {
        let mut caller = Caller::new(Arc::new(Connection::new(address)), timeout);
        let answer = caller.call(call).await;
        answer.map_err(anyhow::Error::msg).with_context(|| format!("first request to {address}"))
    })
}

/// # Errors
/// When the operating system gives no more descriptors.
pub fn runtime() -> Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

/// What was used within the window.
struct Used {
    server: Option<ServerUsed>,
    client: Duration,
    /// Everything on the machine, server and client too.
    machine: Duration,
    length: Duration,
}

struct ServerUsed {
    cpu: Duration,
    system: Duration,
    rss_mib: f64,
}

/// Sleeps through the window and gives what was used in it.
fn measure(window: Window, server: Option<Process>, own: Process) -> Result<Used> {
    let look = |at: Instant| -> Result<_> {
        std::thread::sleep(at.saturating_duration_since(Instant::now()));
        let of_server = server.map(|server| server.cpu()).transpose()?;
        Ok((of_server, own.cpu()?.total, process::machine_busy()?, Instant::now()))
    };
    let before = look(window.start)?;
    let after = look(window.end)?;
    let used = match (server, before.0, after.0) {
        (Some(server), Some(before), Some(after)) => Some(ServerUsed {
            cpu: after.total.saturating_sub(before.total),
            system: after.system.saturating_sub(before.system),
            rss_mib: server.rss_mib()?,
        }),
        _ => None,
    };
    Ok(Used {
        server: used,
        client: after.1.saturating_sub(before.1),
        machine: after.2.saturating_sub(before.2),
        length: after.3 - before.3,
    })
}

fn report(record: &Record, load: &Load, used: &Used, (sent, got): (usize, usize)) -> Report {
    let answered = record.answered.max(1) as f64;
    let per_request = |cpu: Duration| cpu.as_secs_f64() * 1e6 / answered;
    let cores = |cpu: Duration| cpu.as_secs_f64() / used.length.as_secs_f64();
    let server = used.server.as_ref().map(|server| Usage {
        cpu_us_per_request: per_request(server.cpu),
        cores: cores(server.cpu),
        system_share: (server.system.as_secs_f64() / server.cpu.as_secs_f64().max(1e-9)).min(1.0),
        rss_mib: server.rss_mib,
    });
    let others = used
        .server
        .as_ref()
        .map(|server| cores(used.machine.saturating_sub(server.cpu).saturating_sub(used.client)));
    let seconds = load.length.as_secs_f64();
    Report {
        seconds,
        requests: record.answered,
        due: matches!(load.pace, Pace::Open { .. }).then_some(record.due),
        errors: record.errors.clone(),
        requests_per_s: record.answered as f64 / seconds,
        latency_us: record.latencies(),
        server,
        client_cpu_us_per_request: per_request(used.client),
        others_cores: others,
        request_bytes: sent,
        answer_bytes: got,
    }
}

/// One thread's part of the load.
#[derive(Clone, Copy)]
struct Share<'a> {
    address: SocketAddr,
    call: &'a Call,
    load: &'a Load,
    start: Instant,
    window: Window,
    index: usize,
    threads: usize,
}

impl Share<'_> {
    fn run(self) -> Result<Record> {
        let record = Arc::new(Mutex::new(Record::default()));
        let queue = Arc::new(Queue::default());
        let runtime = runtime()?;
        std::thread::scope(|scope| {
            if let Pace::Open { rate, arrivals, seed } = self.load.pace {
                let length = self.load.warmup + self.load.length;
                let all = schedule::offsets(arrivals, rate, length, seed);
                let own: Vec<_> = all.into_iter().skip(self.index).step_by(self.threads).collect();
                let (queue, record) = (Arc::clone(&queue), Arc::clone(&record));
                scope.spawn(move || self.arrive(&own, &queue, &record));
            }
            runtime.block_on(self.call_all(&queue, &record))
        })?;
        Ok(std::mem::take(&mut *locked(&record)))
    }

    async fn call_all(self, queue: &Arc<Queue>, record: &Arc<Mutex<Record>>) -> Result<()> {
        let mut callers = Vec::new();
        for _ in (self.index..self.load.connections).step_by(self.threads) {
            let connection = Arc::new(Connection::new(self.address));
            for _ in 0..self.load.streams_per_connection {
                let task = Task {
                    caller: Caller::new(Arc::clone(&connection), self.load.timeout),
                    call: self.call.clone(),
                    record: Arc::clone(record),
                    start: self.start,
                    window: self.window,
                };
                callers.push(match self.load.pace {
                    Pace::Closed => tokio::spawn(task.closed()),
                    Pace::Open { .. } => tokio::spawn(task.open(Arc::clone(queue))),
                });
            }
        }
        for caller in callers {
            caller.await.context("a caller panicked")?;
        }
        Ok(())
    }

    /// Makes this thread's arrivals due, each at its time. A thread's sleep is as exact as the
    /// kernel's timers; tokio's ticks once a millisecond.
    fn arrive(self, offsets: &[Duration], queue: &Queue, record: &Mutex<Record>) {
        for offset in offsets {
            let due = self.start + *offset;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            locked(record).due += u64::from(self.window.has(due));
            locked(&queue.due).push_back(due);
            queue.changed.notify_one();
        }
        locked(&queue.closed_at).replace(Instant::now() + self.load.timeout);
        // Wakes one caller, or the next that waits; each caller that ends wakes another.
        queue.changed.notify_one();
    }
}

/// Arrivals that no caller has taken yet; as many as the schedule has at most.
#[derive(Default)]
struct Queue {
    due: Mutex<VecDeque<Instant>>,
    changed: Notify,
    /// Set after the last arrival: what is not sent by then is given up.
    closed_at: Mutex<Option<Instant>>,
}

/// No code that holds such a lock panics, so what it guards is whole.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Task {
    caller: Caller,
    call: Call,
    record: Arc<Mutex<Record>>,
    start: Instant,
    window: Window,
}

impl Task {
    async fn closed(mut self) {
        self.connect().await;
        tokio::time::sleep_until(self.start.into()).await;
        loop {
            let sent = Instant::now();
            if sent >= self.window.end {
                return;
            }
            let answer = self.caller.call(&self.call).await;
            let now = Instant::now();
            self.record(answer.as_ref(), now, self.window.has(now), now - sent);
            if answer.is_err() {
                tokio::time::sleep(FAILURE_PAUSE).await;
            }
        }
    }

    async fn open(mut self, queue: Arc<Queue>) {
        self.connect().await;
        loop {
            let next = locked(&queue.due).pop_front();
            let closed_at = *locked(&queue.closed_at);
            match (next, closed_at) {
                (Some(due), closed_at) if closed_at.is_none_or(|at| Instant::now() < at) => {
                    let answer = self.caller.call(&self.call).await;
                    let now = Instant::now();
                    self.record(answer.as_ref(), now, self.window.has(due), now - due);
                }
                (Some(due), _) => {
                    if self.window.has(due) {
                        locked(&self.record).error("not sent in time");
                    }
                }
                (None, Some(_)) => {
                    queue.changed.notify_one();
                    return;
                }
                (None, None) => queue.changed.notified().await,
            }
        }
    }

    async fn connect(&mut self) {
        // A failure shows in the first call.
        if let Err(kind) = self.caller.open(self.call.protocol).await {
            locked(&self.record).error(&kind);
        }
    }

    /// `timed`: whether the latency counts. Requests are counted by when they were answered.
    fn record(
        &self,
        answer: Result<&usize, &String>,
        now: Instant,
        timed: bool,
        latency: Duration,
    ) {
        let mut record = locked(&self.record);
        match answer {
            Ok(_) => {
                record.answered += u64::from(self.window.has(now));
                if timed {
                    record.latency(latency);
                }
            }
            Err(kind) if timed => record.error(kind),
            Err(_) => {}
        }
    }
}
