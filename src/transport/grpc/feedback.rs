//! `tidegate.v1.Feedback`: what became of predictions.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::encode;
use crate::domain::{Failure, ModelName, Protocol};
use crate::feedback::{Item, ItemError, Label, Said};
use crate::proto::feedback as pb;
use crate::proto::feedback::feedback_server::Feedback;
use crate::transport::auth::Caller;
use crate::transport::{Api, feedback, meta};

pub(super) struct Service {
    api: Arc<Api>,
}

impl Service {
    pub(super) fn new(api: Arc<Api>) -> Self {
        Self { api }
    }

    async fn taken(
        &self,
        caller: &Caller,
        request: &Request<pb::SendRequest>,
    ) -> Result<pb::SendResponse, Failure> {
        let arrived = super::arrived(request);
        let headers = request.metadata().as_ref();
        let meta = meta::call_meta(headers, Protocol::Grpc, arrived, &self.api)?;
        let pb::SendRequest { model_name, items } = request.get_ref();
        let model: ModelName = model_name.parse().map_err(|error| {
            let shown: String = model_name.chars().take(128).collect();
            Failure::not_found(format!("model '{shown}' is not found: {error}"))
        })?;
        let read =
            |(at, item): (usize, &pb::Item)| read(item).map_err(|why| feedback::wrong(at, &why));
        let items: Vec<Item> = items.iter().enumerate().map(read).collect::<Result<_, _>>()?;
        let results = feedback::send(&self.api, caller, meta, &model, items).await?;
        let result = |(prediction_id, outcome): (String, crate::feedback::Outcome)| pb::Result {
            prediction_id,
            status: outcome.as_str().to_owned(),
        };
        Ok(pb::SendResponse { results: results.into_iter().map(result).collect() })
    }
}

#[tonic::async_trait]
impl Feedback for Service {
    async fn send(
        &self,
        request: Request<pb::SendRequest>,
    ) -> Result<Response<pb::SendResponse>, Status> {
        let caller = super::caller(&request);
        let taken = self.taken(&caller, &request).await;
        taken.map(Response::new).map_err(|failure| encode::status(&failure, None))
    }
}

fn read(item: &pb::Item) -> Result<Item, ItemError> {
    use pb::label::Value;
    let label = |label: &pb::Label| {
        Ok(Some(match &label.value {
            None => return Ok(None),
            Some(Value::Bool(value)) => Label::Bool(*value),
            Some(Value::Int(number)) => Label::Int(*number),
            Some(Value::Number(number)) => Label::number(*number)?,
            Some(Value::Text(text)) => Label::text(text.clone())?,
        }))
    };
    fn given(text: &str) -> Option<&str> {
        (!text.is_empty()).then_some(text)
    }
    Item::new(Said {
        id: &item.prediction_id,
        labels: item.labels.iter().map(label).collect::<Result<_, _>>()?,
        metric: given(&item.metric),
        value: item.value,
        at: given(&item.at),
    })
}
