//! One admitted call: who asks, for what, and with which conditions.
//!
//! The guard of a route makes it, after it has let the caller in; handlers only take what they
//! need of it.

use std::borrow::Cow;
use std::sync::Arc;

use axum::extract::{FromRequest, FromRequestParts, Request};
use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use http::request::Parts;
use http::{HeaderMap, HeaderValue};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, SchemaType, Type};
use utoipa::{PartialSchema, ToSchema};

use super::etag::Condition;
use super::gate::Caller;
use super::json;
use super::limits::{
    BODY_BYTES_MAX, BODY_WAIT_MAX, DISCARDED_BYTES_MAX, DISCARDED_WAIT_MAX, PATH_TEXT_MAX,
};
use super::problem::{INTERNAL, NOT_FOUND, Problem, SLOW_BODY, TOO_LARGE, UNSUPPORTED_MEDIA};
use crate::control::call::{Call, REASON_LEN_MAX};
use crate::domain::{Label, ModelName, Version};

/// Header with the reason of a change that has no body.
pub(super) const REASON_HEADER: &str = "tidegate-reason";

/// Longest id of a rollout.
const ROLLOUT_ID_MAX: usize = 128;

/// What the guard knows of a call when a handler begins.
#[derive(Clone)]
pub(super) struct Asked {
    pub(super) caller: Caller,
    /// Without the credential.
    pub(super) headers: Arc<HeaderMap>,
    pub(super) names: Names,
    condition: Option<Condition>,
    reason: Option<String>,
}

/// The parameters of a path, parsed.
#[derive(Clone, Debug, Default)]
pub(super) struct Names {
    pub(super) model: Option<ModelName>,
    pub(super) version: Option<Version>,
    pub(super) label: Option<Label>,
    pub(super) rollout: Option<String>,
    pub(super) prediction: Option<String>,
}

impl Names {
    /// What cannot be a name is not found: nothing has it.
    pub(super) fn read<'a>(
        params: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, Problem> {
        let mut names = Self::default();
        for (key, text) in params {
            let missing = || {
                let shown: String = text.chars().take(PATH_TEXT_MAX).collect();
                NOT_FOUND.because(format!("{key} '{shown}' is not found"))
            };
            match key {
                "model" => names.model = Some(text.parse().map_err(|_| missing())?),
                "version" => names.version = Some(text.parse().map_err(|_| missing())?),
                "label" => names.label = Some(text.parse().map_err(|_| missing())?),
                "rollout" => {
                    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
                    let right = !text.is_empty() && text.len() <= ROLLOUT_ID_MAX;
                    if !right || !text.bytes().all(plain) {
                        return Err(missing());
                    }
                    names.rollout = Some(text.to_owned());
                }
                _ => names.prediction = Some(text.chars().take(PATH_TEXT_MAX).collect()),
            }
        }
        Ok(names)
    }

    /// What the call is about, for the journal: as the path has it.
    pub(super) fn subject(&self) -> String {
        let mut subject = self.model.as_ref().map(ToString::to_string).unwrap_or_default();
        if let Some(version) = self.version {
            subject = format!("{subject}/{version}");
        }
        let rest = [
            self.label.as_ref().map(Label::as_str),
            self.rollout.as_deref(),
            self.prediction.as_deref(),
        ];
        for part in rest.into_iter().flatten() {
            subject = format!("{subject}/{part}");
        }
        subject
    }
}

/// Text for everything that a caller may not know of: the same whether it is there or not.
pub(super) fn no_model(model: &ModelName) -> Problem {
    NOT_FOUND.because(format!("model '{model}' is not found"))
}

impl Asked {
    /// # Errors
    /// `invalid` for conditions or a reason that cannot be read.
    pub(super) fn new(
        caller: Caller,
        names: Names,
        mut headers: HeaderMap,
        change: bool,
    ) -> Result<Self, Problem> {
        headers.remove(http::header::AUTHORIZATION);
        let (mut condition, mut reason) = (None, None);
        if change {
            condition = Condition::of_change(&headers)?;
            reason = match headers.get(REASON_HEADER) {
                Some(value) => json::reason(&utf8(value)?)?,
                None => None,
            };
        }
        Ok(Self { caller, headers: Arc::new(headers), names, condition, reason })
    }

    pub(super) fn model(&self) -> Result<&ModelName, Problem> {
        self.names.model.as_ref().ok_or_else(unnamed)
    }

    pub(super) fn version(&self) -> Result<Version, Problem> {
        self.names.version.ok_or_else(unnamed)
    }

    pub(super) fn label(&self) -> Result<&Label, Problem> {
        self.names.label.as_ref().ok_or_else(unnamed)
    }

    pub(super) fn rollout(&self) -> Result<&str, Problem> {
        self.names.rollout.as_deref().ok_or_else(unnamed)
    }

    /// The change as the director takes it. `current` is the resource's present tag, asked for
    /// where `If-Match` leaves a choice.
    ///
    /// # Errors
    /// `stale` when no tag of `If-Match` is the present one.
    pub(super) fn call(
        &self,
        reason: Option<String>,
        current: impl FnOnce() -> Option<String>,
    ) -> Result<Call, Problem> {
        let if_match = match &self.condition {
            Some(condition) => condition.wanted(current)?,
            None => None,
        };
        Ok(Call { if_match, ..self.plain_call(reason) })
    }

    /// The change of something that has no tag.
    pub(super) fn plain_call(&self, reason: Option<String>) -> Call {
        Call {
            actor: self.caller.principal.name.to_string(),
            reason: reason.or_else(|| self.reason.clone()),
            if_match: None,
            request_id: Some(self.caller.request_id.clone()),
        }
    }
}

/// A route that does not name what its handler wants.
fn unnamed() -> Problem {
    INTERNAL.because("the gateway failed at this")
}

/// Header values are bytes; people write reasons in their own language.
fn utf8(value: &HeaderValue) -> Result<String, Problem> {
    String::from_utf8(value.as_bytes().to_vec())
        .map_err(|_| Problem::invalid(vec![format!("{REASON_HEADER}: expected UTF-8")]))
}

impl<S: Sync> FromRequestParts<S> for Asked {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        parts.extensions.get::<Self>().cloned().ok_or_else(unnamed)
    }
}

/// The body of a change, and the reason in it.
pub(super) struct Change<T> {
    pub(super) what: T,
    pub(super) reason: Option<String>,
}

/// What a change says in its body when its path says all.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

/// Body of such a change: only a reason may stand in it, and it may be empty.
pub(super) type Reason = Change<Nothing>;

/// The resource's schema with `reason` beside what it has.
impl<T: ToSchema> PartialSchema for Change<T> {
    fn schema() -> RefOr<Schema> {
        let mut schema = T::schema();
        if let RefOr::T(Schema::Object(object)) = &mut schema {
            let why = ObjectBuilder::new()
                .schema_type(SchemaType::from_iter([Type::String, Type::Null]))
                .max_length(Some(REASON_LEN_MAX))
                .description(Some("Why, for the journal. Required where policy says so."));
            object.properties.insert("reason".to_owned(), why.into());
        }
        schema
    }
}

impl<T: ToSchema> ToSchema for Change<T> {
    fn name() -> Cow<'static, str> {
        match T::name() {
            nothing if nothing == "Nothing" => Cow::Borrowed("ChangeReason"),
            of => Cow::Owned(format!("{of}Change")),
        }
    }

    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        T::schemas(schemas);
    }
}

impl<T: DeserializeOwned, S: Sync> FromRequest<S> for Change<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let bytes = body(request).await?;
        let (what, reason) = json::read(&bytes)?;
        Ok(Self { what, reason })
    }
}

/// A whole body, declared as JSON unless it is empty.
async fn body(request: Request) -> Result<Bytes, Problem> {
    let (head, body) = request.into_parts();
    let bytes = whole(&head.headers, body).await?;
    if !bytes.is_empty() && !is_json(&head.headers) {
        return Err(UNSUPPORTED_MEDIA.because("Content-Type: expected application/json"));
    }
    Ok(bytes)
}

/// A whole body, within limits.
pub(super) async fn whole(headers: &HeaderMap, body: axum::body::Body) -> Result<Bytes, Problem> {
    let too_large = || TOO_LARGE.because(format!("the limit is {BODY_BYTES_MAX} bytes"));
    let declared = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if declared.is_some_and(|len: u64| len > BODY_BYTES_MAX as u64) {
        discard(body).await;
        return Err(too_large());
    }
    if headers.get(CONTENT_ENCODING).is_some_and(|value| value != "identity") {
        return Err(UNSUPPORTED_MEDIA.because("Content-Encoding: bodies come as they are"));
    }
    let arriving = Limited::new(body, BODY_BYTES_MAX).collect();
    match timeout(BODY_WAIT_MAX, arriving).await {
        Err(_) => Err(SLOW_BODY.because(format!("the limit is {} s", BODY_WAIT_MAX.as_secs()))),
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(Problem::invalid(vec!["body: ended before it was whole".to_owned()])),
    }
}

/// Takes what is on its way, and keeps nothing of it: whoever is still sending when the connection
/// ends would not hear why.
async fn discard(mut body: axum::body::Body) {
    let mut left = DISCARDED_BYTES_MAX;
    let read = async {
        while let Some(Ok(frame)) = body.frame().await {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            if left == 0 {
                return;
            }
        }
    };
    // Whoever takes longer is not told.
    timeout(DISCARDED_WAIT_MAX, read).await.ok();
}

/// `application/json`, and no charset but UTF-8.
fn is_json(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(CONTENT_TYPE).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return false };
    let Ok(text) = value.to_str() else { return false };
    let mut parts = text.split(';').map(str::trim);
    let essence = parts.next().unwrap_or_default();
    essence.eq_ignore_ascii_case("application/json")
        && parts.all(|part| {
            let charset =
                part.split_once('=').filter(|(name, _)| name.eq_ignore_ascii_case("charset"));
            charset.is_none_or(|(_, set)| set.trim_matches('"').eq_ignore_ascii_case("utf-8"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_once_and_what_is_none_is_not_found() {
        let all = [("model", "iris"), ("version", "2")];
        let names = Names::read(all).unwrap();
        assert_eq!(names.subject(), "iris/2");
        let of_rollout = Names::read([("model", "iris"), ("rollout", "0190-a.b_c")]).unwrap();
        assert_eq!(of_rollout.subject(), "iris/0190-a.b_c");
        for (key, text) in [
            ("model", "a b"),
            ("model", ""),
            ("version", "07"),
            ("version", "stable"),
            ("label", "7"),
            ("rollout", ""),
            ("rollout", "a:b"),
            ("rollout", &"x".repeat(ROLLOUT_ID_MAX + 1)),
        ] {
            let problem = Names::read([(key, text)]).unwrap_err();
            assert_eq!(problem.kind, NOT_FOUND, "{key}: {text}");
        }
    }

    #[test]
    fn only_json_is_json() {
        let is = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(CONTENT_TYPE, value.parse().unwrap());
            }
            is_json(&headers)
        };
        for yes in [
            "application/json",
            "Application/JSON; charset=UTF-8",
            "application/json;charset=\"utf-8\"",
        ] {
            assert!(is(&[yes]), "{yes}");
        }
        for no in [
            "text/plain",
            "application/jsonp",
            "application/json; charset=utf-16",
            "",
            "application/x-www-form-urlencoded",
            "multipart/form-data",
            "application/problem+json",
        ] {
            assert!(!is(&[no]), "{no}");
        }
        assert!(!is(&[]) && !is(&["application/json", "application/json"]));
    }

    #[tokio::test]
    async fn bodies_have_an_end() {
        let kind = |len: usize, headers: &[(http::HeaderName, &'static str)]| {
            let mut map = HeaderMap::new();
            for (name, value) in headers {
                map.insert(name, HeaderValue::from_static(value));
            }
            let body = axum::body::Body::from(vec![b' '; len]);
            async move {
                whole(&map, body)
                    .await
                    .map(|bytes| bytes.len())
                    .map_err(|problem| problem.kind.code)
            }
        };
        assert_eq!(kind(BODY_BYTES_MAX, &[]).await, Ok(BODY_BYTES_MAX));
        assert_eq!(kind(BODY_BYTES_MAX + 1, &[]).await, Err("too_large"));
        assert_eq!(kind(1, &[(CONTENT_LENGTH, "9999999999")]).await, Err("too_large"));
        assert_eq!(kind(1, &[(CONTENT_ENCODING, "gzip")]).await, Err("unsupported_media"));
        assert_eq!(kind(1, &[(CONTENT_ENCODING, "identity")]).await, Ok(1));
    }
}
