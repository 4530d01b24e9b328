//! What the admin listener may ask of control: the director's interface, as a trait.
//!
//! The listener knows HTTP and who is calling; the director knows what a change means. They meet
//! here, so that the listener is tested without models and the director without a socket.
//!
//! Invariants of every change (methods that take a [`Call`]):
//! - It is durable, then in force, then answered: what starts after the answer obeys it.
//! - A refused one changes nothing and is in the journal, as a made one is.
//! - It is carried to its end when the caller goes away in the middle.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::broadcast;

use super::call::{Call, Refusal, Versioned};
use super::rollout::{Command, Plan, Rollout};
use super::store::{Event, EventQuery};
use super::view::{
    ApprovalRequest, ApprovalsView, ModelView, ReloadView, ShadowView, TrafficView, VersionView,
};
use crate::domain::{Digest, Label, ModelName, Traffic, Version};

/// A change under way.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = Result<T, Refusal>> + Send + 'a>>;

/// The labels of one model.
pub type Labels = BTreeMap<Label, Version>;

pub trait Desk: Send + Sync {
    /// In the order of their names.
    fn models(&self) -> Vec<ModelView>;

    fn model(&self, model: &ModelName) -> Option<ModelView>;

    /// # Errors
    /// `NotFound`.
    fn version(
        &self,
        model: &ModelName,
        version: Version,
    ) -> Result<Versioned<VersionView>, Refusal>;

    /// Answers when the version is ready (or held for approval), or is known not to become so.
    /// `accept_digest`: the bytes that a quarantined version has now, and that are right.
    fn load<'a>(
        &'a self,
        model: &'a ModelName,
        version: Version,
        accept_digest: Option<Digest>,
        call: Call,
    ) -> Pending<'a, Versioned<VersionView>>;

    /// Answers when the version's last request has ended.
    fn unload<'a>(
        &'a self,
        model: &'a ModelName,
        version: Version,
        call: Call,
    ) -> Pending<'a, Versioned<VersionView>>;

    /// # Errors
    /// `NotFound`.
    fn labels(&self, model: &ModelName) -> Result<Versioned<Labels>, Refusal>;

    fn put_label<'a>(
        &'a self,
        model: &'a ModelName,
        label: Label,
        version: Version,
        call: Call,
    ) -> Pending<'a, Versioned<Labels>>;

    fn delete_label<'a>(
        &'a self,
        model: &'a ModelName,
        label: &'a Label,
        call: Call,
    ) -> Pending<'a, Versioned<Labels>>;

    /// # Errors
    /// `NotFound`.
    fn traffic(&self, model: &ModelName) -> Result<Versioned<TrafficView>, Refusal>;

    fn put_traffic<'a>(
        &'a self,
        model: &'a ModelName,
        traffic: Traffic,
        call: Call,
    ) -> Pending<'a, Versioned<TrafficView>>;

    /// Back to following `stable`, or the latest version.
    fn delete_traffic<'a>(
        &'a self,
        model: &'a ModelName,
        call: Call,
    ) -> Pending<'a, Versioned<TrafficView>>;

    /// Back to the last good table: in force at once, then made durable, then answered.
    fn rollback<'a>(
        &'a self,
        model: &'a ModelName,
        call: Call,
    ) -> Pending<'a, Versioned<TrafficView>>;

    fn start_rollout<'a>(
        &'a self,
        model: &'a ModelName,
        plan: Plan,
        call: Call,
    ) -> Pending<'a, Versioned<Rollout>>;

    /// The newest first.
    ///
    /// # Errors
    /// `NotFound`.
    fn rollouts(&self, model: &ModelName) -> Result<Vec<Rollout>, Refusal>;

    /// # Errors
    /// `NotFound`.
    fn rollout(&self, model: &ModelName, id: &str) -> Result<Versioned<Rollout>, Refusal>;

    fn command_rollout<'a>(
        &'a self,
        model: &'a ModelName,
        id: &'a str,
        command: Command,
        call: Call,
    ) -> Pending<'a, Versioned<Rollout>>;

    /// # Errors
    /// `NotFound`.
    fn approvals(
        &self,
        model: &ModelName,
        version: Version,
    ) -> Result<Versioned<ApprovalsView>, Refusal>;

    fn approve<'a>(
        &'a self,
        model: &'a ModelName,
        version: Version,
        request: ApprovalRequest,
        call: Call,
    ) -> Pending<'a, Versioned<ApprovalsView>>;

    fn journal(&self, query: EventQuery) -> Pending<'_, Vec<Event>>;

    /// Everything that is journalled from now on. A reader that lags is told, and reads the journal
    /// from where it was.
    fn events(&self) -> broadcast::Receiver<Arc<Event>>;

    /// Journals a call that the listener refused by itself.
    fn refused<'a>(
        &'a self,
        action: &'a str,
        model: Option<&'a ModelName>,
        subject: &'a str,
        call: &'a Call,
        detail: &'a str,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

    /// Journals what the listener does by itself: that somebody read what is somebody's data.
    ///
    /// # Errors
    /// When it cannot be journalled: then it must not be done.
    fn noted<'a>(
        &'a self,
        action: &'a str,
        model: Option<&'a ModelName>,
        subject: &'a str,
        call: &'a Call,
    ) -> Pending<'a, ()>;

    /// Looks at the source now.
    fn reload(&self, call: Call) -> Pending<'_, ReloadView>;

    /// What shadows of the model's versions answered, beside what was answered for real.
    ///
    /// # Errors
    /// `NotFound`.
    fn shadow(&self, model: &ModelName) -> Result<ShadowView, Refusal>;

    /// A registry said that something changed: look soon. Cheap, and may be called often.
    fn webhook_hint(&self);
}
