//! What a version says of a table's rows, for outputs that the table has not.
//!
//! It runs in this process: there is nothing else here that it could harm.

use std::sync::Arc;

use super::{Args, Found};
use crate::cli::admin::Stop;
use crate::cli::frame::{Binding, Inputs, Table};
use crate::domain::{ModelName, Signature, Version};
use crate::drift::feature::Role;
use crate::drift::learn::Learner;
use crate::drift::rows::{Plan, Scratch};
use crate::engine::{Artifact, Engines, LoadOptions, Model};

pub(super) struct Predictor {
    name: (ModelName, Version),
    signature: Signature,
    engine: &'static str,
    model: Arc<dyn Model>,
}

#[derive(Default)]
pub(super) struct Predicted {
    /// Numbers of the features that have values now.
    pub(super) features: Vec<usize>,
    pub(super) notes: Vec<String>,
}

impl Predictor {
    /// # Errors
    /// When the model cannot be loaded, or the table has its predictions already.
    pub(super) fn new(args: &Args, found: &Found, table: &Table) -> Result<Self, Stop> {
        if table.ledger {
            let problem = "the ledger's Parquet has the outputs of its predictions";
            return Err(Stop::usage(format_args!("'--predict': {problem}")));
        }
        let failed = |error: crate::engine::EngineError| {
            Stop::failed(format_args!("'{}': {error}", found.path.display()))
        };
        let engines = Engines::open(args.engine, args.ort_library.as_deref()).map_err(failed)?;
        let artifact = Artifact { path: found.path.clone(), derived: None };
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let options = LoadOptions { intra_threads: threads, sessions: 1, providers: Vec::new() };
        let (engine, model) = engines.load(args.engine, &artifact, &options).map_err(failed)?;
        let name = (args.model.clone(), found.version);
        Ok(Self { name, signature: found.signature.clone(), engine, model })
    }

    /// Adds outputs that have no column.
    pub(super) fn fill(
        self,
        table: &Table,
        binding: &Binding,
        learner: &mut Learner,
    ) -> Result<Predicted, Stop> {
        let Self { name: (name, version), signature, engine, model } = self;
        let features = learner.features().to_vec();
        let outputs = signature.outputs.iter().enumerate();
        let outputs: Vec<(usize, &str)> = outputs
            .map(|(at, spec)| (at, spec.name.as_str()))
            .filter(|(_, output)| binding.lacks(&features, Role::Output, output))
            .collect();
        let is_wanted = |tensor: &str| outputs.iter().any(|(_, output)| *output == tensor);
        let wanted = features.iter().enumerate();
        let wanted: Vec<_> =
            wanted.filter(|(_, f)| f.role == Role::Output && is_wanted(&f.tensor)).collect();
        if outputs.is_empty() {
            let note = "every output that is watched has a column: nothing was predicted";
            return Ok(Predicted { features: Vec::new(), notes: vec![note.to_owned()] });
        }
        let inputs = Inputs::new(&signature, &features, binding, table)?;
        let filled: Vec<usize> = wanted.iter().map(|(number, _)| *number).collect();
        let plan = Plan::numbered(wanted);
        let failed = |error: crate::engine::EngineError| {
            Stop::failed(format_args!("{name}/{version} cannot run a row: {error}"))
        };
        let mut session = model.session().map_err(failed)?;
        let mut scratch = Scratch::default();
        let taken = inputs.read(table, |tensors| {
            let said = session.run(tensors).map_err(failed)?;
            for (at, output) in &outputs {
                let Some(tensor) = said.get(*at) else { continue };
                let batched = signature.batched;
                plan.read(Role::Output, output, tensor, batched, &mut scratch, |_, to, value| {
                    learner.add(to, value);
                });
            }
            Ok(())
        })?;
        let names: Vec<&str> = outputs.iter().map(|(_, output)| *output).collect();
        let (names, rows) = (names.join(", "), taken.rows);
        let mut notes =
            vec![format!("{names}: what {name}/{version} says of {rows} rows ({engine})")];
        if taken.left_out > 0 {
            let left_out = taken.left_out;
            notes
                .push(format!("{left_out} rows were not run: an input is missing or does not fit"));
        }
        Ok(Predicted { features: filled, notes })
    }
}
