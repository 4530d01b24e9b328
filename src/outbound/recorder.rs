//! For tests: a real HTTP server on this machine that writes down what it gets.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::net::TcpListener;

/// What it answers: a status, a header, a body. Status 0: never.
pub(crate) type Canned = (u16, Option<(&'static str, String)>, &'static str);

#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) at: Timestamp,
    pub(crate) method: String,
    /// With the query.
    pub(crate) path: String,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Bytes,
}

impl Received {
    pub(crate) fn header(&self, name: &str) -> String {
        let value = self.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
        value.unwrap_or_default()
    }
}

/// Answers from a list, the last one again and again.
pub(crate) struct Recorder {
    pub(crate) address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
}

impl Recorder {
    pub(crate) async fn start(answers: Vec<Canned>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let received = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&received);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (all, answers) = (Arc::clone(&all), answers.clone());
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let (all, answers) = (Arc::clone(&all), answers.clone());
                        async move { Ok::<_, Infallible>(write_down(request, &all, &answers).await) }
                    });
                    let http = hyper::server::conn::http1::Builder::new();
                    drop(http.serve_connection(TokioIo::new(stream), service).await);
                });
            }
        });
        Self { address, received }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    pub(crate) fn received(&self) -> Vec<Received> {
        self.received.lock().clone()
    }
}

async fn write_down(
    request: Request<hyper::body::Incoming>,
    all: &Mutex<Vec<Received>>,
    answers: &[Canned],
) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let (method, path) = (head.method.to_string(), head.uri.to_string());
    let number = {
        let mut all = all.lock();
        all.push(Received { at: Timestamp::now(), method, path, headers: head.headers, body });
        all.len() - 1
    };
    let (status, header, body) = answers.get(number).or(answers.last()).unwrap();
    if *status == 0 {
        std::future::pending::<()>().await;
    }
    let mut response = Response::builder().status(*status);
    if let Some((name, value)) = header {
        response = response.header(*name, value);
    }
    response.body(Full::new(Bytes::from_static(body.as_bytes()))).unwrap()
}
