//! The OpenAPI 3.1 document: what every operation has in common is added here, so that a handler
//! says only what is its own.
//!
//! Added to each: parameters of its path, the request id, conditions and reason of changes, the
//! credential, and every refusal there can be, all with one body.

use http::Method;
use utoipa::PartialSchema;
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{Operation, Parameter, ParameterBuilder, ParameterIn, PathItem};
use utoipa::openapi::response::ResponseBuilder;
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{
    ComponentsBuilder, Info, OpenApi, OpenApiBuilder, Ref, RefOr, Required, Response,
    SecurityRequirement, Server,
};

use super::asked::REASON_HEADER;
use super::doors::{Door, PREFIX};
use super::gate::Needs;
use super::problem::{KINDS, PROBLEM_JSON, ProblemBody};
use crate::control::call::REASON_LEN_MAX;

/// Name of the scheme.
const BEARER: &str = "bearer";

/// Names of models and labels, as `domain::names` reads them.
const NAME_PATTERN: &str = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$";
/// A label is not all digits.
const LABEL_PATTERN: &str = "^(?![0-9]+$)[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$";
const VERSION_PATTERN: &str = "^[1-9][0-9]{0,17}$";
const ID_PATTERN: &str = "^[A-Za-z0-9._-]{1,128}$";

/// The document without operations.
pub(super) fn base() -> OpenApi {
    let mut scheme = Http::new(HttpAuthScheme::Bearer);
    scheme.bearer_format = Some("tg_<id>.<secret>".to_owned());
    scheme.description = Some(
        "A token of 'tidegate keys create', or the first one in '<state>/admin-token'. Where the \
         listener asks for client certificates, a certificate is a credential too."
            .to_owned(),
    );
    let mut info = Info::new("Tidegate admin API", env!("CARGO_PKG_VERSION"));
    info.description = Some(DESCRIPTION.to_owned());
    let components = ComponentsBuilder::new()
        .security_scheme(BEARER, SecurityScheme::Http(scheme))
        .schema("Problem", ProblemBody::schema());
    OpenApiBuilder::new()
        .info(info)
        .servers(Some([Server::new(PREFIX)]))
        .components(Some(components.build()))
        .build()
}

const DESCRIPTION: &str = "Which models and versions run, what traffic they get, and why. A change \
    is durable, then in force, then answered: every request that starts after the answer obeys it. \
    Every change and every refused one is in the journal. Resources carry an `ETag`; a change that \
    sends it in `If-Match` is refused with 412 when somebody was faster.";

/// The one operation of a path item that `routes!(handler)` made.
pub(super) fn only_operation(item: &mut PathItem) -> Option<(Method, &mut Operation)> {
    let PathItem { get, put, post, delete, .. } = item;
    [(Method::GET, get), (Method::PUT, put), (Method::POST, post), (Method::DELETE, delete)]
        .into_iter()
        .find_map(|(method, operation)| Some((method, operation.as_mut()?)))
}

/// Adds what every operation has.
pub(super) fn complete(operation: &mut Operation, door: &Door) {
    let parameters = operation.parameters.get_or_insert_with(Vec::new);
    let mut first: Vec<_> = names(&door.path).map(path_parameter).map(RefOr::T).collect();
    first.append(parameters);
    *parameters = first;
    parameters.push(RefOr::T(request_id()));
    if door.change() {
        parameters.push(RefOr::T(reason()));
        if !STANDALONE.contains(&door.name.as_str()) {
            parameters.push(RefOr::T(if_match()));
        }
    }
    if let Some(RefOr::T(body)) = &mut operation.request_body
        && body_is_optional(door)
    {
        body.required = Some(Required::False);
    }
    let credential = match door.needs {
        Needs::Nothing => SecurityRequirement::default(),
        _ => SecurityRequirement::new::<_, [&str; 0], &str>(BEARER, []),
    };
    operation.security = Some(vec![credential]);
    for answer in operation.responses.responses.values_mut() {
        if let RefOr::T(answer) = answer {
            answer.headers.insert("x-request-id".to_owned(), id_header().into());
        }
    }
    for status in refusals(door) {
        let refusal = RefOr::T(refusal(status));
        operation.responses.responses.entry(status.to_string()).or_insert(refusal);
    }
}

/// Verbs say all in their path.
fn body_is_optional(door: &Door) -> bool {
    let verb = door.path.contains(':') && door.name != "audit.erase";
    verb || matches!(door.name.as_str(), "drain" | "reload")
}

/// Changes of something that has no tag.
const STANDALONE: [&str; 5] =
    ["audit.erase", "audit.rotateKey", "drain", "reload", "rollout.start"];

/// `{model}` and the others, in their order.
fn names(path: &str) -> impl Iterator<Item = &str> {
    path.split('{').skip(1).filter_map(|rest| rest.split('}').next())
}

fn text(pattern: &str) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::String).pattern(Some(pattern))
}

fn path_parameter(name: &str) -> Parameter {
    let (pattern, example, what) = match name {
        "model" => (NAME_PATTERN, "iris", "Name of the model."),
        "version" => (VERSION_PATTERN, "2", "Number of the version."),
        "label" => (LABEL_PATTERN, "stable", "Name of the label; not only digits."),
        "rollout" => (ID_PATTERN, "0193e5a0-7c1d-7b7a-8d8e-2f4f7b1c9a10", "Id of the rollout."),
        _ => (ID_PATTERN, "0193e5a0-7c1d-7b7a-8d8e-2f4f7b1c9a10", "Id."),
    };
    ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Path)
        .required(Required::True)
        .description(Some(what))
        .schema(Some(text(pattern).examples([example])))
        .build()
}

fn header(name: &str, description: &str, schema: ObjectBuilder) -> Parameter {
    ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Header)
        .required(Required::False)
        .description(Some(description))
        .schema(Some(schema))
        .build()
}

fn request_id() -> Parameter {
    let what = "Id of this request, for the log and the journal; made when it is missing.";
    // Without a pattern: one that cannot be used is replaced, not refused.
    header("x-request-id", what, ObjectBuilder::new().schema_type(Type::String))
}

fn if_match() -> Parameter {
    let what = "`ETag` that the resource must still have, or `*`.";
    header("if-match", what, text("^(\\*|\"[!#-~]*\")$").examples(["\"7\""]))
}

fn reason() -> Parameter {
    let what = "Why, for the journal. `reason` in the body wins. Required where policy says so.";
    let schema = ObjectBuilder::new().schema_type(Type::String).max_length(Some(REASON_LEN_MAX));
    header(REASON_HEADER, what, schema)
}

fn id_header() -> utoipa::openapi::Header {
    HeaderBuilder::new()
        .description(Some("Id of this request."))
        .schema(Some(ObjectBuilder::new().schema_type(Type::String)))
        .build()
}

/// Statuses that a route may refuse with.
fn refusals(door: &Door) -> Vec<u16> {
    let mut statuses = vec![400, 403, 414, 421, 500, 503, 504];
    if door.needs != Needs::Nothing {
        statuses.push(401);
    }
    if door.path.contains('{') {
        statuses.push(404);
    }
    if door.change() {
        statuses.extend([408, 409, 412, 413, 415]);
    }
    statuses
}

fn refusal(status: u16) -> Response {
    let of_status = KINDS.iter().filter(|kind| kind.status.as_u16() == status);
    let codes: Vec<String> =
        of_status.map(|kind| format!("`{}`: {}", kind.code, kind.title)).collect();
    let body = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build();
    let mut answer = ResponseBuilder::new()
        .description(codes.join("; "))
        .content(PROBLEM_JSON, body)
        .header("x-request-id", id_header());
    let text = || ObjectBuilder::new().schema_type(Type::String);
    if status == 401 {
        let challenge = HeaderBuilder::new().schema(Some(text())).description(Some("`Bearer`."));
        answer = answer.header("www-authenticate", challenge.build());
    }
    if status == 503 {
        let wait = HeaderBuilder::new().schema(Some(text())).description(Some("Seconds to wait."));
        answer = answer.header("retry-after", wait.build());
    }
    answer.build()
}
