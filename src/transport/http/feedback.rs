//! `POST /v2/models/{model}/feedback`: one item or a list of them.

use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::json::{Object, from_slice};
use super::reply::Reply;
use crate::domain::{Failure, ModelName, Protocol};
use crate::feedback::{Item, ItemError, Label, Said};
use crate::transport::auth::Caller;
use crate::transport::meta::{self, Arrived};
use crate::transport::{Api, feedback};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ItemJson {
    prediction_id: String,
    label: Option<Value>,
    metric: Option<String>,
    value: Option<f64>,
    at: Option<String>,
}

pub(super) async fn answer(
    api: &Api,
    caller: &Caller,
    model: &ModelName,
    (headers, arrived): (&HeaderMap, Arrived),
    body: &[u8],
) -> Result<Reply, Failure> {
    let meta = meta::call_meta(headers, Protocol::Http, arrived, api)?;
    let results = feedback::send(api, caller, meta, model, items(body)?).await?;
    let result = |(id, outcome): &(String, crate::feedback::Outcome)| json!({"prediction_id": id, "status": outcome.as_str()});
    let results: Value = results.iter().map(result).collect();
    Ok(Reply::json(StatusCode::ACCEPTED, json!({"results": results}).to_string()))
}

fn items(body: &[u8]) -> Result<Vec<Item>, Failure> {
    let is_list = body.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[');
    let all: Vec<Object<ItemJson>> = match is_list {
        true => from_slice(body)?,
        false => vec![from_slice(body)?],
    };
    let read = |(at, Object(item)): (usize, Object<ItemJson>)| {
        item.read().map_err(|why| feedback::wrong(at, &why))
    };
    all.into_iter().enumerate().map(read).collect()
}

impl ItemJson {
    fn read(self) -> Result<Item, ItemError> {
        let labels = match self.label {
            None => Vec::new(),
            Some(Value::Array(all)) if all.is_empty() => return Err(ItemError::LabelEmpty),
            Some(Value::Array(all)) => {
                let optional = |value| match value {
                    Value::Null => Ok(None),
                    value => label(value).map(Some),
                };
                all.into_iter().map(optional).collect::<Result<_, _>>()?
            }
            Some(value) => vec![Some(label(value)?)],
        };
        Item::new(Said {
            id: &self.prediction_id,
            labels,
            metric: self.metric.as_deref(),
            value: self.value,
            at: self.at.as_deref(),
        })
    }
}

fn label(value: Value) -> Result<Label, ItemError> {
    match value {
        Value::Bool(value) => Ok(Label::Bool(value)),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(number), _) => Ok(Label::Int(number)),
            (None, Some(number)) => Label::number(number),
            (None, None) => Err(ItemError::Label),
        },
        Value::String(text) => Label::text(text),
        Value::Null | Value::Array(_) | Value::Object(_) => Err(ItemError::Label),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "019ab7a2-6c1f-7d3e-9b5a-0c2d4e6f8a1b";

    fn read(rest: &str) -> Result<Vec<Item>, String> {
        let body = rest.replace("ID", &format!("\"prediction_id\": \"{ID}\""));
        items(body.as_bytes()).map_err(|failure| failure.message)
    }

    #[test]
    fn one_item_and_a_list_are_read_alike() {
        let one = read("{ID, \"label\": 1.0}").unwrap();
        assert_eq!(one[0].labels, [Some(Label::Int(1))]);
        assert_eq!(read(" \n[{ID, \"label\": 1}]").unwrap(), one);
        let rows = read("{ID, \"label\": [true, null, \"cat\", 0.5]}").unwrap();
        let want = [
            Some(Label::Bool(true)),
            None,
            Some(Label::Text("cat".into())),
            Some(Label::Number(0.5)),
        ];
        assert_eq!(rows[0].labels, want);
        let metric = read("{ID, \"metric\": \"revenue\", \"value\": 3}").unwrap();
        assert_eq!(metric[0].metric, Some(("revenue".to_owned(), 3.0)));
        assert_eq!(read("[]").unwrap(), []);
    }

    proptest! {
        /// Whatever comes, it is read or refused, and what is read says something.
        #[test]
        fn any_body_is_read_or_refused(
            bytes in proptest::collection::vec(any::<u8>(), 0..64),
            text in "[\\[{]{0,3}(\"(prediction_id|label|metric|value|at)\": ?(-?[0-9e.]{1,9}|null|true|\"[a-z0-9-]{0,9}\"|\\[|\\{),?){0,6}[\\]}]{0,3}",
        ) {
            for body in [&bytes[..], text.as_bytes()] {
                for item in items(body).unwrap_or_default() {
                    prop_assert!(!item.labels.is_empty() || item.metric.is_some());
                }
            }
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let cases = [
            ("", "request body"),
            ("{}", "prediction_id"),
            ("{ID}", "item 0: expected a label"),
            ("{ID, \"lable\": 1}", "lable"),
            ("{ID, \"label\": 1, \"label\": 2}", "duplicate"),
            ("{ID, \"label\": []}", "says nothing"),
            ("{ID, \"label\": [null]}", "says nothing"),
            ("{ID, \"label\": {}}", "expected true or false"),
            ("{ID, \"label\": [[1]]}", "expected true or false"),
            ("{ID, \"label\": 1e999}", "request body"),
            ("[{ID, \"label\": 1}, {ID, \"metric\": \"m\"}]", "item 1: metric: has no value"),
            ("[{ID, \"label\": 1}, 3]", "object"),
            ("{\"prediction_id\": \"17\", \"label\": 1}", "item 0: prediction_id"),
        ];
        for (body, why) in cases {
            let message = read(body).unwrap_err();
            assert!(message.contains(why), "{body}: {message}");
        }
    }
}
