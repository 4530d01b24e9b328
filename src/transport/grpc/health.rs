//! `grpc.health.v1`: the same truth that the readiness routes tell.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_server};

use crate::transport::Api;

/// Follows the health of the process.
pub(super) struct Watched {
    api: Arc<Api>,
}

impl Watched {
    pub(super) fn new(api: Arc<Api>) -> Self {
        Self { api }
    }
}

fn known(service: &str) -> bool {
    service.is_empty() || service == super::SERVICE
}

fn status(api: &Api, service: &str) -> ServingStatus {
    match (known(service), api.health.is_ready()) {
        (false, _) => ServingStatus::ServiceUnknown,
        (true, true) => ServingStatus::Serving,
        (true, false) => ServingStatus::NotServing,
    }
}

fn message(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl health_server::Health for Watched {
    type WatchStream = ReceiverStream<Result<HealthCheckResponse, Status>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let service = &request.get_ref().service;
        if !known(service) {
            return Err(Status::not_found("unknown service"));
        }
        Ok(Response::new(message(status(&self.api, service))))
    }

    /// Ends when the process drains, after saying so: a watch would hold its connection open.
    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let api = Arc::clone(&self.api);
        let service = request.into_inner().service;
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            let mut changes = api.health.changes();
            let mut said = None;
            loop {
                let draining = api.health.is_draining();
                let now = status(&api, &service);
                if said != Some(now) {
                    said = Some(now);
                    if sender.send(Ok(message(now))).await.is_err() {
                        return;
                    }
                }
                if draining {
                    return;
                }
                tokio::select! {
                    more = changes.changed() => if !more { return },
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
