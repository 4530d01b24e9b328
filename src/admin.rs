//! The admin API: which versions run, what traffic they get, and why; over HTTP, for people, CI
//! systems and our own command line.
//!
//! ```text
//! socket ─▶ listener ─▶ front: one host, request id, who calls? ─▶ router ─▶ guard: may they?
//!           TLS, limits        │ 401, 421, …                          404, 405     │ 403, 404
//!                              ▼                                                   ▼
//!           answer ◀── problem bodies ◀────────────────────────────────────── handler ─▶ Desk
//! ```
//!
//! The handlers are thin: they parse, call the director through [`Desk`] and show what it says.
//!
//! Invariants:
//! - Without a credential nothing is answered but `GET /admin/v1/health` and a registry's webhook,
//!   which proves itself by its signature. Unknown paths are no exception.
//! - Every refusal has one form, says what to do, and carries the request's id; nothing in it tells
//!   of models that the caller may not see.
//! - A change is carried to its end when its caller goes away.
//! - Neither the token nor a body is ever logged.
//! - The document at `openapi.json` is made from the same table as the router.

use std::sync::Arc;
use std::sync::OnceLock;

use axum::Router;
use axum::response::IntoResponse;
use bytes::Bytes;
use http::header::{CACHE_CONTROL, HeaderName};
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tower_service::Service;
use uuid::Uuid;

use crate::admit::{Clients, Gatekeeper};
use crate::control::alerts::Alerts;
use crate::control::call::{Call, Refusal};
use crate::control::desk::{Desk, Pending};
use crate::feedback::Feedback;
use crate::ledger::Ledger;
use crate::monitor::Monitor;
use crate::panics;
use crate::route::{Published, RouteTable};

mod asked;
mod document;
mod doors;
mod etag;
mod gate;
mod hosts;
mod json;
mod limits;
mod listener;
pub mod problem;
mod routes;
#[cfg(test)]
mod tests;

pub use doors::{Door, PREFIX};
pub use gate::{Needs, Peer};
pub use hosts::Hosts;
pub use listener::{Handshake, Tls, serve};

use gate::{Caller, Known, Strangers};
use problem::{INTERNAL, INVALID, NOT_FOUND, OVERLOADED, Problem, URI_TOO_LONG};

/// Request id, in both directions.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Starts the gateway's drain and journals it.
pub type Drain = Box<dyn Fn(Call) -> Pending<'static, ()> + Send + Sync>;

/// Checks a registry's webhook by its headers and raw body.
pub type Webhook = Box<dyn Fn(&HeaderMap, &[u8]) -> Result<(), Refusal> + Send + Sync>;

/// What the listener is made of.
pub struct Parts {
    pub desk: Arc<dyn Desk>,
    pub gatekeeper: Arc<Gatekeeper>,
    /// What clients with a certificate may do.
    pub clients: Clients,
    /// Names that the listener answers to, beside addresses and `localhost`.
    pub hosts: Hosts,
    pub drain: Drain,
    /// `None` where no MLflow registry with a secret is configured.
    pub mlflow: Option<Webhook>,
    /// `None` where nothing is recorded.
    pub audit: Option<Audit>,
    /// `None` where nothing can be said of predictions.
    pub feedback: Option<Arc<Feedback>>,
    /// `None` where nobody looks at the rows.
    pub monitor: Option<Arc<Monitor>>,
    /// `None` where nobody is told of anything.
    pub alerts: Option<Alerts>,
}

/// The ledger, and the versions that it records the predictions of.
pub struct Audit {
    pub ledger: Arc<Ledger>,
    pub table: Arc<Published<RouteTable>>,
}

/// What handlers share.
struct Admin {
    desk: Arc<dyn Desk>,
    known: Known,
    drain: Drain,
    mlflow: Option<Webhook>,
    audit: Option<Audit>,
    feedback: Option<Arc<Feedback>>,
    monitor: Option<Arc<Monitor>>,
    alerts: Option<Alerts>,
    strangers: Strangers,
    readers: routes::events::Readers,
    /// Set once, when the table of routes is complete.
    document: OnceLock<Bytes>,
}

/// The API without its sockets.
pub struct Api {
    admin: Arc<Admin>,
    hosts: Hosts,
    router: Router,
    doors: Vec<Door>,
    calls: Semaphore,
    /// Apart from the others, so that strangers cannot take their room.
    open_calls: Semaphore,
}

/// Nobody could call: the listener would only look as if it was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the admin API has no keys and no clients with a certificate, make one with 'tidegate keys create'"
)]
pub struct NoCredentials;

impl Api {
    /// # Errors
    /// [`NoCredentials`]: there is no admin API that is open to all.
    pub fn new(parts: Parts) -> Result<Arc<Self>, NoCredentials> {
        let Parts {
            desk,
            gatekeeper,
            clients,
            hosts,
            drain,
            mlflow,
            audit,
            feedback,
            monitor,
            alerts,
        } = parts;
        if gatekeeper.is_empty() && clients.is_empty() {
            return Err(NoCredentials);
        }
        let admin = Arc::new(Admin {
            desk,
            known: Known { gatekeeper, clients },
            drain,
            mlflow,
            audit,
            feedback,
            monitor,
            alerts,
            strangers: Strangers::default(),
            readers: routes::events::Readers::default(),
            document: OnceLock::new(),
        });
        let (router, document, doors) = routes::all(Arc::clone(&admin)).done();
        // Strings, numbers and lists of them: it cannot fail.
        let document = serde_json::to_vec(&document).unwrap_or_default();
        admin.document.get_or_init(|| document.into());
        let (calls, open_calls) =
            (Semaphore::new(limits::CALLS_MAX), Semaphore::new(limits::OPEN_CALLS_MAX));
        Ok(Arc::new(Self { admin, hosts, router, doors, calls, open_calls }))
    }

    /// Every way in, for tables in tests and documents.
    pub fn doors(&self) -> &[Door] {
        &self.doors
    }

    /// The OpenAPI document.
    pub fn document(&self) -> Bytes {
        self.admin.document.get().cloned().unwrap_or_default()
    }

    /// Answers one request, whatever it is.
    pub async fn answer<B>(&self, peer: &Peer, request: Request<B>) -> Response<axum::body::Body>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<axum::BoxError>,
    {
        let id = request_id(request.headers());
        let head = request.method() == Method::HEAD;
        let request = request.map(axum::body::Body::new);
        let admitted = panics::caught_async(self.admitted(peer, &id, request)).await;
        let answer = match admitted {
            Some(Ok(answer)) => answer,
            Some(Err(problem)) => problem.into_response(),
            None => INTERNAL.because("the gateway failed at this").into_response(),
        };
        finished(answer, &id, head)
    }

    /// The order is the point: what is cheap and says nothing about us comes first, and no path is
    /// looked at before its caller.
    async fn admitted(
        &self,
        peer: &Peer,
        id: &str,
        mut request: Request<axum::body::Body>,
    ) -> Result<Response<axum::body::Body>, Problem> {
        let uri = request.uri();
        if uri.path_and_query().map_or(0, |text| text.as_str().len()) > limits::URI_BYTES_MAX {
            return Err(
                URI_TOO_LONG.because(format!("the limit is {} bytes", limits::URI_BYTES_MAX))
            );
        }
        self.hosts.check(uri, request.headers())?;
        let inner = doors::inner_path(uri.path());
        let open = inner.as_deref().is_some_and(|path| self.is_open(path, request.method()));
        if !open {
            let found = Caller::identify(&self.admin.known, peer, request.headers(), id);
            match found {
                Ok(caller) => drop(request.extensions_mut().insert(caller)),
                Err(problem) => {
                    let shown: String = uri.path().chars().take(limits::PATH_TEXT_MAX).collect();
                    let subject = format!("{} {shown}", request.method());
                    return Err(self.stranger(peer, id, &subject, problem).await);
                }
            }
        }
        let room = if open { &self.open_calls } else { &self.calls };
        let Ok(_call) = room.try_acquire() else {
            return Err(OVERLOADED.because("as many calls as there may be are being answered"));
        };
        let path = inner.ok_or_else(|| NOT_FOUND.because("there is no such path"))?;
        *request.uri_mut() = inner_uri(&path, request.uri())?;
        // A router is always ready, and its error has no values.
        self.router.clone().call(request).await.map_err(|never| match never {})
    }

    /// Routes that need no credential; everything else does, whether it exists or not.
    fn is_open(&self, path: &str, method: &Method) -> bool {
        let method = if method == Method::HEAD { &Method::GET } else { method };
        let open = self.doors.iter().filter(|door| door.needs == Needs::Nothing);
        open.into_iter().any(|door| door.path == path && door.method == method)
    }

    /// Journals a call without a valid credential, or counts it.
    async fn stranger(
        &self,
        peer: &Peer,
        id: &str,
        subject: &str,
        mut problem: Problem,
    ) -> Problem {
        problem.journalled = true;
        if let Some(others) = self.admin.strangers.count(Instant::now()) {
            let mut detail = format!("{} from {}", problem.detail, peer.address.ip());
            if others > 0 {
                detail = format!("{detail}; {others} before it were only counted");
            }
            tracing::warn!(peer = %peer.address, "an admin call had no valid credential");
            let call = Call {
                actor: "unknown".to_owned(),
                request_id: Some(id.to_owned()),
                ..Call::default()
            };
            self.admin.desk.refused("admin.call", None, subject, &call, &detail).await;
        }
        problem
    }
}

/// The caller's id when it is one, otherwise a new one.
fn request_id(headers: &HeaderMap) -> String {
    let sent = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let right = |id: &&str| {
        (1..=limits::REQUEST_ID_MAX).contains(&id.len())
            && id.bytes().all(|byte| byte.is_ascii_graphic())
    };
    sent.filter(right).map_or_else(|| Uuid::now_v7().to_string(), ToOwned::to_owned)
}

fn inner_uri(path: &str, uri: &Uri) -> Result<Uri, Problem> {
    let text = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    text.parse().map_err(|_| INVALID.because("the path is none"))
}

/// The last touch on every answer: problems get their body, and all get the id.
fn finished(
    answer: Response<axum::body::Body>,
    id: &str,
    head: bool,
) -> Response<axum::body::Body> {
    let known = answer.extensions().get::<Problem>().cloned();
    let problem = known.or_else(|| Problem::of_status(answer.status()));
    let mut answer = match problem {
        Some(problem) => problem.respond(id, &answer),
        None => answer,
    };
    if head {
        // Over HTTP/2 nobody else takes it off.
        *answer.body_mut() = axum::body::Body::empty();
    }
    let headers = answer.headers_mut();
    if let Ok(value) = HeaderValue::from_str(id) {
        headers.insert(REQUEST_ID, value);
    }
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    headers.insert("content-security-policy", HeaderValue::from_static("default-src 'none'"));
    answer
}
