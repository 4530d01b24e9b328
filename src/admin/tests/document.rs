//! The OpenAPI document and the page for people, against the routes there are.

use std::collections::BTreeSet;

use http::Method;
use serde_json::{Value, json};

use super::Bench;
use crate::admin::problem::PROBLEM_JSON;
use crate::admin::{Door, Needs, PREFIX};
use crate::admit::{Action, Role};

fn is_change(door: &Door) -> bool {
    door.method != Method::GET
}

/// Operations of the document: `POST /models/{model}:rollback`.
fn documented(document: &Value) -> BTreeSet<String> {
    let paths = document["paths"].as_object().unwrap();
    let operations = paths.iter().flat_map(|(path, item)| {
        item.as_object()
            .unwrap()
            .keys()
            .map(move |method| format!("{} {path}", method.to_uppercase()))
    });
    operations.collect()
}

#[test]
fn the_document_and_the_routes_are_the_same() {
    let bench = Bench::new();
    let document: Value = serde_json::from_slice(&bench.api.document()).unwrap();
    assert_eq!(document["openapi"], "3.1.0");
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(document["servers"][0]["url"], PREFIX);
    assert_eq!(document["components"]["securitySchemes"]["bearer"]["scheme"], "bearer");
    let routes: BTreeSet<String> =
        bench.api.doors().iter().map(|door| format!("{} {}", door.method, door.path)).collect();
    assert_eq!(documented(&document), routes);
    assert!(routes.contains("POST /models/{model}/versions/{version}:load"));
    assert!(routes.contains("POST /models/{model}:rollback"));
}

#[test]
fn each_operation_documents_what_it_answers() {
    let bench = Bench::new();
    let document: Value = serde_json::from_slice(&bench.api.document()).unwrap();
    let mut ids = BTreeSet::new();
    for door in bench.api.doors() {
        let operation = &document["paths"][&door.path][door.method.as_str().to_lowercase()];
        let name = &door.name;
        assert!(ids.insert(name.clone()), "{name}");
        assert_eq!(operation["operationId"], **name);
        assert!(operation["summary"].is_string(), "{name}");
        let answers = operation["responses"].as_object().unwrap();
        assert!(answers.keys().any(|status| status.starts_with('2')), "{name}");
        for (status, answer) in answers.iter().filter(|(status, _)| status.as_str() >= "400") {
            let schema = &answer["content"][PROBLEM_JSON]["schema"]["$ref"];
            assert_eq!(schema, "#/components/schemas/Problem", "{name} {status}");
        }
        let open = door.needs == Needs::Nothing;
        assert_eq!(answers.contains_key("401"), !open, "{name}");
        assert_eq!(
            operation["security"],
            if open { json!([{}]) } else { json!([{"bearer": []}]) },
            "{name}"
        );
        let parameters = operation["parameters"].as_array().unwrap();
        let named = |what: &str| parameters.iter().any(|each| each["name"] == what);
        assert!(
            door.path.split('{').skip(1).all(|rest| named(rest.split('}').next().unwrap())),
            "{name}"
        );
        assert_eq!(named("tidegate-reason"), is_change(door) && !open, "{name}");
        if is_change(door) && door.method != Method::DELETE {
            assert!(operation["requestBody"]["content"]["application/json"].is_object(), "{name}");
        }
    }
}

#[test]
fn every_reference_of_the_document_leads_somewhere() {
    fn refs<'a>(value: &'a Value, into: &mut Vec<&'a str>) {
        match value {
            Value::Object(members) => {
                for (key, value) in members {
                    match value.as_str() {
                        Some(target) if key == "$ref" => into.push(target),
                        _ => refs(value, into),
                    }
                }
            }
            Value::Array(all) => all.iter().for_each(|value| refs(value, into)),
            _ => {}
        }
    }
    let bench = Bench::new();
    let document: Value = serde_json::from_slice(&bench.api.document()).unwrap();
    let mut all = Vec::new();
    refs(&document, &mut all);
    assert!(all.len() > 50);
    for target in all {
        let found = document.pointer(target.trim_start_matches('#'));
        assert!(found.is_some(), "{target} is not there");
    }
    let traffic = &document["components"]["schemas"]["TrafficChange"];
    assert!(
        traffic["properties"]["reason"].is_object() && traffic["properties"]["weights"].is_object()
    );
    assert_eq!(traffic["additionalProperties"], false, "unknown fields are refused");
    assert!(document["components"]["schemas"]["Traffic"]["properties"]["reason"].is_null());
}

#[test]
fn needs_are_what_the_page_for_people_says() {
    let page = include_str!("../../../docs/admin-api.md");
    let bench = Bench::new();
    for door in bench.api.doors() {
        let roles = match door.needs {
            Needs::Nothing => "anybody".to_owned(),
            Needs::Credential => "any key".to_owned(),
            Needs::Right(action) | Needs::Some(action) => roles(action),
        };
        let row = format!("| `{} {}` | {roles} |", door.method, door.path);
        assert!(page.contains(&row), "docs/admin-api.md lacks a row that begins with '{row}'");
    }
    for kind in crate::admin::problem::KINDS {
        let row = format!("| {} | `{}` |", kind.status.as_u16(), kind.code);
        assert!(page.contains(&row), "docs/admin-api.md lacks a row that begins with '{row}'");
    }
}

fn roles(action: Action) -> String {
    let roles = Role::ALL.into_iter().filter(|role| role.may(action));
    roles.map(|role| role.to_string()).collect::<Vec<_>>().join(", ")
}
