//! The director as the admin listener sees it.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::broadcast;

use super::{Director, books};
use crate::control::call::{Call, Refusal, Versioned};
use crate::control::desk::{Desk, Labels, Pending};
use crate::control::rollout::{Command, Plan, Rollout};
use crate::control::store::{Event, EventQuery};
use crate::control::view::{
    ApprovalRequest, ApprovalsView, ModelView, ReloadView, ShadowView, TrafficView, VersionView,
};
use crate::domain::{Digest, Label, ModelName, Traffic, Version};

impl Desk for Director {
    fn models(&self) -> Vec<ModelView> {
        self.inner.models()
    }

    fn model(&self, model: &ModelName) -> Option<ModelView> {
        self.inner.model(model)
    }

    fn version(
        &self,
        model: &ModelName,
        version: Version,
    ) -> Result<Versioned<VersionView>, Refusal> {
        self.inner.version(model, version)
    }

    fn load<'a>(
        &'a self,
        model: &'a ModelName,
        version: Version,
        accept_digest: Option<Digest>,
        call: Call,
    ) -> Pending<'a, Versioned<VersionView>> {
        self.inner.load(model.clone(), version, accept_digest, call)
    }

    fn unload<'a>(
        &'a self,
        model: &'a ModelName,
        version: Version,
        call: Call,
    ) -> Pending<'a, Versioned<VersionView>> {
        self.inner.unload(model.clone(), version, call)
    }

    fn labels(&self, model: &ModelName) -> Result<Versioned<Labels>, Refusal> {
        self.inner.labels(model)
    }

    fn put_label<'a>(
        &'a self,
        model: &'a ModelName,
        label: Label,
        version: Version,
        call: Call,
    ) -> Pending<'a, Versioned<Labels>> {
        let model = model.clone();
        self.inner.run(move |inner| inner.put_label(&model, label, version, &call))
    }

    fn delete_label<'a>(
        &'a self,
        model: &'a ModelName,
        label: &'a Label,
        call: Call,
    ) -> Pending<'a, Versioned<Labels>> {
        let (model, label) = (model.clone(), label.clone());
        self.inner.run(move |inner| inner.delete_label(&model, &label, &call))
    }

    fn traffic(&self, model: &ModelName) -> Result<Versioned<TrafficView>, Refusal> {
        self.inner.traffic(model)
    }

    fn put_traffic<'a>(
        &'a self,
        model: &'a ModelName,
        traffic: Traffic,
        call: Call,
    ) -> Pending<'a, Versioned<TrafficView>> {
        let model = model.clone();
        self.inner.run(move |inner| inner.put_traffic(&model, traffic, &call))
    }

    fn delete_traffic<'a>(
        &'a self,
        model: &'a ModelName,
        call: Call,
    ) -> Pending<'a, Versioned<TrafficView>> {
        let model = model.clone();
        self.inner.run(move |inner| inner.delete_traffic(&model, &call))
    }

    fn rollback<'a>(
        &'a self,
        model: &'a ModelName,
        call: Call,
    ) -> Pending<'a, Versioned<TrafficView>> {
        // Here and now: the swap must not wait for a thread.
        self.inner.swap_back(model, &call);
        let model = model.clone();
        self.inner.run(move |inner| inner.rollback(&model, &call))
    }

    fn start_rollout<'a>(
        &'a self,
        model: &'a ModelName,
        plan: Plan,
        call: Call,
    ) -> Pending<'a, Versioned<Rollout>> {
        self.inner.start_rollout(model.clone(), plan, call)
    }

    fn rollouts(&self, model: &ModelName) -> Result<Vec<Rollout>, Refusal> {
        self.inner.rollouts(model)
    }

    fn rollout(&self, model: &ModelName, id: &str) -> Result<Versioned<Rollout>, Refusal> {
        self.inner.rollout(model, id)
    }

    fn command_rollout<'a>(
        &'a self,
        model: &'a ModelName,
        id: &'a str,
        command: Command,
        call: Call,
    ) -> Pending<'a, Versioned<Rollout>> {
        self.inner.command_rollout(model.clone(), id.to_owned(), command, call)
    }

    fn approvals(
        &self,
        model: &ModelName,
        version: Version,
    ) -> Result<Versioned<ApprovalsView>, Refusal> {
        self.inner.approvals(model, version)
    }

    fn approve<'a>(
        &'a self,
        model: &'a ModelName,
        version: Version,
        request: ApprovalRequest,
        call: Call,
    ) -> Pending<'a, Versioned<ApprovalsView>> {
        let model = model.clone();
        self.inner.run(move |inner| inner.approve(&model, version, request, &call))
    }

    fn journal(&self, query: EventQuery) -> Pending<'_, Vec<Event>> {
        self.inner.run(move |inner| inner.store.events(&query).map_err(books::internal))
    }

    fn events(&self) -> broadcast::Receiver<Arc<Event>> {
        self.inner.events.subscribe()
    }

    fn refused<'a>(
        &'a self,
        action: &'a str,
        model: Option<&'a ModelName>,
        subject: &'a str,
        call: &'a Call,
        detail: &'a str,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        let (action, subject, detail) = (action.to_owned(), subject.to_owned(), detail.to_owned());
        let (model, call) = (model.cloned(), call.clone());
        let noted = self.inner.run(move |inner| {
            inner.journal_refused(&action, model.as_ref(), &subject, &call, &detail);
            Ok(())
        });
        Box::pin(async move {
            if let Err(refusal) = noted.await {
                tracing::error!(%refusal, "a refused call is not journalled");
            }
        })
    }

    fn noted<'a>(
        &'a self,
        action: &'a str,
        model: Option<&'a ModelName>,
        subject: &'a str,
        call: &'a Call,
    ) -> Pending<'a, ()> {
        let (action, subject) = (action.to_owned(), subject.to_owned());
        let (model, call) = (model.cloned(), call.clone());
        self.inner.run(move |inner| {
            inner.append(&[inner.event(&action, model.as_ref(), &subject, &call)])
        })
    }

    fn reload(&self, call: Call) -> Pending<'_, ReloadView> {
        self.inner.reload(call)
    }

    fn shadow(&self, model: &ModelName) -> Result<ShadowView, Refusal> {
        self.inner.shadow(model)
    }

    fn webhook_hint(&self) {
        self.inner.hint.notify_one();
    }
}
