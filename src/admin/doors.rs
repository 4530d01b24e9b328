//! The table of routes: each way in once, with what it needs, how it is served and how it is
//! documented.
//!
//! A path like `/models/{model}/versions/{version}:load` is what callers and the OpenAPI document
//! see. The router underneath cannot tell a name from a `:verb` in one segment, so the verb is a
//! segment of its own there, marked with a `~` that no name begins with and no caller may send:
//!
//! ```text
//! POST /admin/v1/models/iris/versions/2:load ──inner_path──▶ /models/iris/versions/2/~load
//! ```
//!
//! Invariants:
//! - A handler is reached only through its guard: both are put in by [`Doors::add`].
//! - The document lists exactly the routes there are, because it is made from the same calls.

use std::sync::Arc;

use axum::Router;
use axum::extract::rejection::RawPathParamsRejection;
use axum::extract::{RawPathParams, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use http::Method;
use tokio::time::timeout;
use utoipa::openapi::{Components, OpenApi};
use utoipa_axum::router::UtoipaMethodRouter;

use super::Admin;
use super::asked::{Asked, Names};
use super::document;
use super::gate::{Caller, Needs};
use super::limits::{ANSWER_MAX, LOAD_ANSWER_MAX};
use super::problem::{INTERNAL, NOT_FOUND, Problem, TIMEOUT};
use crate::control::call::Call;

/// Where the API begins.
pub const PREFIX: &str = "/admin/v1";

/// Begins a verb in the router's paths.
const MARK: char = '~';

/// One way in.
#[derive(Clone, Debug)]
pub struct Door {
    /// As the journal and the document call it: `traffic.put`.
    pub name: String,
    pub method: Method,
    /// As the document has it, without the prefix.
    pub path: String,
    pub needs: Needs,
}

impl Door {
    /// Whether it may change something: it is carried to its end, and its refusals are journalled.
    pub(super) fn change(&self) -> bool {
        !matches!(self.method, Method::GET | Method::HEAD) && self.needs != Needs::Nothing
    }

    fn answer_max(&self) -> std::time::Duration {
        match self.name.as_str() {
            "version.load" | "version.unload" => LOAD_ANSWER_MAX,
            _ => ANSWER_MAX,
        }
    }
}

/// Routes, their document and their table, while they are put together.
pub(super) struct Doors {
    admin: Arc<Admin>,
    router: Router<Arc<Admin>>,
    api: OpenApi,
    doors: Vec<Door>,
}

impl Doors {
    pub(super) fn new(admin: Arc<Admin>) -> Self {
        Self { admin, router: Router::new(), api: document::base(), doors: Vec::new() }
    }

    /// One handler, given as `routes!(handler)`, listed in the document.
    pub(super) fn add(
        mut self,
        needs: Needs,
        (schemas, paths, methods): UtoipaMethodRouter<Arc<Admin>>,
    ) -> Self {
        for (path, mut item) in paths.paths {
            let Some((method, operation)) = document::only_operation(&mut item) else { continue };
            let name = operation.operation_id.clone().unwrap_or_default();
            let door = Door { name, method, path: path.clone(), needs };
            document::complete(operation, &door);
            let guarded = (Arc::clone(&self.admin), Arc::new(door.clone()));
            // Layers the handler only, not the answer to other methods.
            let methods = methods.clone().route_layer(from_fn_with_state(guarded, guard));
            self.router = self.router.route(&router_path(&path), methods);
            self.doors.push(door);
            match self.api.paths.paths.get_mut(&path) {
                Some(known) => known.merge_operations(item),
                None => drop(self.api.paths.paths.insert(path, item)),
            }
        }
        let known = &mut self.api.components.get_or_insert_with(Components::new).schemas;
        for (name, schema) in schemas {
            let other = known.get(&name).is_some_and(|known| *known != schema);
            // The document would show one of them for both.
            debug_assert!(!other, "two types are called '{name}' in the document");
            known.insert(name, schema);
        }
        self
    }

    pub(super) fn done(self) -> (Router, OpenApi, Vec<Door>) {
        (self.router.with_state(self.admin), self.api, self.doors)
    }
}

/// `/models/{model}:rollback` → `/models/{model}/~rollback`.
fn router_path(path: &str) -> String {
    match path.rsplit_once(':') {
        Some((before, verb)) => format!("{before}/{MARK}{verb}"),
        None => path.to_owned(),
    }
}

/// The router's path of a caller's; `None` for one that no route can have.
pub(super) fn inner_path(path: &str) -> Option<String> {
    let inner = path.strip_prefix(PREFIX)?;
    let mut segments = inner.split('/');
    // What comes before the first slash: nothing.
    if segments.next() != Some("") || segments.any(|segment| segment.starts_with(MARK)) {
        return None;
    }
    let (before, last) = inner.rsplit_once('/')?;
    match last.rsplit_once(':') {
        Some((name, verb)) => Some(format!("{before}/{name}/{MARK}{verb}")),
        None => Some(inner.to_owned()),
    }
}

/// Stands before each handler: may this caller do this to that?
async fn guard(
    State((admin, door)): State<(Arc<Admin>, Arc<Door>)>,
    params: Result<RawPathParams, RawPathParamsRejection>,
    mut request: Request,
    next: Next,
) -> Response {
    let caller = request.extensions_mut().remove::<Caller>();
    let Some(caller) = caller else {
        return match door.needs {
            Needs::Nothing => next.run(request).await,
            // The front lets nobody get here; it does not hurt to be sure.
            _ => INTERNAL.because("the gateway failed at this").into_response(),
        };
    };
    // What is no text names nothing either.
    let named = params.map_err(|_| NOT_FOUND.because("there is no such path"));
    let names = match named.and_then(|params| Names::read(&params)) {
        Ok(names) => names,
        // Nothing can be so called: a read of it finds nothing, a change of it is refused.
        Err(problem) if !door.change() => return problem.into_response(),
        Err(problem) => return refused(&admin, &door, &caller, &Names::default(), problem).await,
    };
    if let Err(problem) = caller.check(door.needs, &names) {
        return refused(&admin, &door, &caller, &names, problem).await;
    }
    let headers = request.headers().clone();
    match Asked::new(caller.clone(), names.clone(), headers, door.change()) {
        Ok(asked) => request.extensions_mut().insert(asked),
        Err(problem) => return refused(&admin, &door, &caller, &names, problem).await,
    };
    let answer = match door.change() {
        true => carried(&door, next.run(request)).await,
        false => match timeout(door.answer_max(), next.run(request)).await {
            Ok(answer) => answer,
            Err(_) => too_slow(&door).into_response(),
        },
    };
    match answer.extensions().get::<Problem>() {
        Some(problem) if door.change() && !problem.journalled => {
            let problem = problem.clone();
            refused(&admin, &door, &caller, &names, problem).await
        }
        _ => answer,
    }
}

/// A change goes on when its caller goes away: it is made whole, or not at all.
async fn carried(door: &Door, change: impl Future<Output = Response> + Send + 'static) -> Response {
    match timeout(door.answer_max(), tokio::spawn(change)).await {
        Ok(Ok(answer)) => answer,
        // The panic hook has told the log.
        Ok(Err(_)) => journalled(INTERNAL.because("the gateway failed at this")),
        Err(_) => too_slow(door).into_response(),
    }
}

fn too_slow(door: &Door) -> Problem {
    let mut problem =
        TIMEOUT.because(format!("no answer within {} s", door.answer_max().as_secs()));
    // Nothing was refused: it may still be done, and then the journal says so.
    problem.journalled = true;
    problem
}

fn journalled(mut problem: Problem) -> Response {
    problem.journalled = true;
    problem.into_response()
}

/// Journals what the listener itself refuses, and answers it.
async fn refused(
    admin: &Admin,
    door: &Door,
    caller: &Caller,
    names: &Names,
    problem: Problem,
) -> Response {
    let call = Call {
        actor: caller.principal.name.to_string(),
        request_id: Some(caller.request_id.clone()),
        ..Call::default()
    };
    let (subject, detail) = (names.subject(), format!("{}: {}", problem.kind.code, problem.detail));
    admin.desk.refused(&door.name, names.model.as_ref(), &subject, &call, &detail).await;
    journalled(problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbs_become_segments_that_no_caller_can_send() {
        let cases = [
            ("/admin/v1/models", Some("/models")),
            ("/admin/v1/models/iris:rollback", Some("/models/iris/~rollback")),
            ("/admin/v1/models/iris/versions/2:load", Some("/models/iris/versions/2/~load")),
            ("/admin/v1/models/a:b:c", Some("/models/a:b/~c")),
            ("/admin/v1/models/:rollback", Some("/models//~rollback")),
            ("/admin/v1/models/iris/~rollback", None),
            ("/admin/v1/~/models", None),
            ("/admin/v1", None),
            ("/admin/v1models", None),
            ("/admin/v2/models", None),
            ("/v2/health/live", None),
            ("/", None),
            ("*", None),
        ];
        for (path, want) in cases {
            assert_eq!(inner_path(path).as_deref(), want, "{path}");
        }
        assert_eq!(router_path("/models/{model}:rollback"), "/models/{model}/~rollback");
        assert_eq!(router_path("/models/{model}"), "/models/{model}");
    }
}
