//! A client that goes away while its request waits: the request is never run.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tidegate::batch::ThreadBudget;
use tidegate::domain::{BatchSettings, Tensor};
use tidegate::engine::fake::FakeModel;
use tidegate::engine::{EngineError, Model as _, Session};
use tidegate::observe::{self, Observer};
use tidegate::transport::listener::Listeners;
use tidegate::transport::{Api, Settings};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

use crate::gateway_of;
use crate::support::{FOREVER, h2, infer};

const EACH: usize = 50;

/// Runs when it is let.
struct Gated {
    open: Arc<AtomicBool>,
    ran: Arc<AtomicUsize>,
}

impl Session for Gated {
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        self.ran.fetch_add(1, Relaxed);
        while !self.open.load(Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(inputs.to_vec())
    }
}

fn gauge(api: &Api, name: &str) -> f64 {
    let (_, page) = api.gateway.observer().page(None);
    let page = String::from_utf8(page.to_vec()).unwrap();
    let lines = page.lines().filter(|line| line.starts_with(&format!("{name}{{")));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

async fn becomes(api: &Api, name: &str, value: usize) {
    let start = Instant::now();
    while (gauge(api, name) - value as f64).abs() > 0.5 {
        assert!(start.elapsed() < FOREVER, "{name} is {}, expected {value}", gauge(api, name));
        sleep(Duration::from_millis(10)).await;
    }
}

/// How a client leaves.
#[derive(Clone, Copy, Debug)]
enum Leaving {
    Close,
    Reset,
    /// HTTP/2, the whole connection.
    Close2,
    /// HTTP/2, each stream.
    Cancel2,
}

/// Asks `EACH` times, and gives the connections.
async fn ask(address: SocketAddr, leaving: Leaving) -> Vec<TcpStream> {
    let mut streams = Vec::new();
    match leaving {
        Leaving::Close | Leaving::Reset => {
            for _ in 0..EACH {
                let mut stream = TcpStream::connect(address).await.unwrap();
                stream.write_all(&infer(1, "")).await.unwrap();
                streams.push(stream);
            }
        }
        Leaving::Close2 | Leaving::Cancel2 => {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let mut all = h2::hello(&[]);
            for at in 0..EACH {
                all.extend(crate::floods::prediction(u32::try_from(at * 2 + 1).unwrap()));
            }
            stream.write_all(&all).await.unwrap();
            streams.push(stream);
        }
    }
    streams
}

async fn leave(mut streams: Vec<TcpStream>, leaving: Leaving) -> Vec<TcpStream> {
    match leaving {
        Leaving::Close | Leaving::Close2 => streams.clear(),
        Leaving::Reset => {
            for stream in streams.drain(..) {
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
            }
        }
        Leaving::Cancel2 => {
            for at in 0..EACH {
                let id = u32::try_from(at * 2 + 1).unwrap();
                let reset = h2::frame(h2::RST_STREAM, 0, id, &[0, 0, 0, 8]);
                streams[0].write_all(&reset).await.unwrap();
            }
        }
    }
    streams
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_clients_who_left_are_never_run() {
    let (open, ran) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let observer = Observer::new(observe::Settings::default());
    let signature = FakeModel::new(2, 0.0).signature().clone();
    let session = Gated { open: Arc::clone(&open), ran: Arc::clone(&ran) };
    let batch = BatchSettings { size_max: 1, ..BatchSettings::default() };
    let served = gateway_of::served(
        &observer,
        &Arc::new(ThreadBudget::new(2)),
        "echo",
        &signature,
        vec![Box::new(session)],
        batch,
    );
    let control = Arc::new(gateway_of::NoControl);
    let gateway = tidegate::gateway::Settings::default();
    let api = gateway_of::api(observer, control, [served], gateway, Settings::default());
    let mut listeners = Listeners::new(Arc::clone(&api)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    listeners.serve(listener);

    let mut first = TcpStream::connect(address).await.unwrap();
    first.write_all(&infer(1, "")).await.unwrap();
    becomes(&api, "tidegate_in_flight", 1).await;
    let mut kept = Vec::new();
    for leaving in [Leaving::Close, Leaving::Reset, Leaving::Close2, Leaving::Cancel2] {
        let streams = ask(address, leaving).await;
        becomes(&api, "tidegate_in_flight", 1 + EACH).await;
        let start = Instant::now();
        kept.extend(leave(streams, leaving).await);
        becomes(&api, "tidegate_in_flight", 1).await;
        println!(
            "C13: {EACH} waiting requests left by {leaving:?}, let go after {:?}",
            start.elapsed()
        );
    }
    open.store(true, Relaxed);
    let mut answer = vec![0; 4096];
    let read = first.read(&mut answer).await.unwrap();
    assert!(answer[..read].starts_with(b"HTTP/1.1 200"));
    // One that waits behind them is served, so the queue has been passed through.
    first.write_all(&infer(1, "")).await.unwrap();
    let read = first.read(&mut answer).await.unwrap();
    assert!(answer[..read].starts_with(b"HTTP/1.1 200"));
    becomes(&api, "tidegate_in_flight", 0).await;
    println!("C13: {} runs for 2 clients who stayed and {} who left", ran.load(Relaxed), 4 * EACH);
    assert_eq!(ran.load(Relaxed), 2);
    drop(kept);
}
