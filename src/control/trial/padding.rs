//! Whether a model can tell padding from content.
//!
//! Invariant: requests of unequal length are joined only on a model that was seen to give a row in
//! such company what it gives the row alone.

use super::super::samples::{Sample, same};
use super::{Findings, JOIN_TOLERANCE, filled, shape_of};
use crate::batch::{Form, Padding};
use crate::domain::{NamedTensor, PaddingSettings, Signature, Tensor};
use crate::engine::Session;

/// How the model pads, if it was declared and is so.
///
/// What is wrong with the declaration itself is for the parent to say.
pub(in super::super) fn explore(
    session: &mut dyn Session,
    signature: &Signature,
    settings: Option<&PaddingSettings>,
    findings: &mut Findings,
) -> Option<Form> {
    let settings = settings?;
    let padding = Padding::new(settings, signature).ok()?;
    let form = Form { batched: true, padding: Some(padding) };
    let made = Made { signature, settings, form: &form, size: findings.size };
    // Ones may be no valid input (an index into a table of one); zeros were seen to be.
    let tried = match made.alike(session, 1) {
        Err(Tried::Failed(_)) => made.alike(session, 0),
        told => told,
    };
    match tried {
        Ok(()) => {
            findings.padded = true;
            Some(form)
        }
        Err(Tried::Failed(reason) | Tried::Differs(reason)) => {
            findings.notes.push(format!("requests of unequal length are not joined: {reason}"));
            None
        }
    }
}

/// Runs samples that stand next to each other together, where they join, and compares.
///
/// # Errors
/// When one does not get what it expects.
pub(in super::super) fn check_samples(
    session: &mut dyn Session,
    signature: &Signature,
    form: &Form,
    samples: &[Sample],
) -> Result<(), String> {
    for (at, pair) in samples.windows(2).enumerate() {
        let rows: Vec<Vec<Tensor>> =
            pair.iter().map(|sample| sample.inputs(signature)).collect::<Result<_, _>>()?;
        let [first, second] = &rows[..] else { continue };
        if !form.joins(first, second) {
            continue;
        }
        let cut = together(session, form, &rows).and_then(|cut| {
            let mut each = pair.iter().zip(&cut);
            each.try_for_each(|(sample, cut)| {
                sample.compare(signature, cut).map_err(Tried::Differs)
            })
        });
        if let Err(Tried::Failed(what) | Tried::Differs(what)) = cut {
            return Err(format!("samples {at} and {} padded to one length: {what}", at + 1));
        }
    }
    Ok(())
}

enum Tried {
    /// It could not be found out.
    Failed(String),
    Differs(String),
}

fn together(
    session: &mut dyn Session,
    form: &Form,
    rows: &[Vec<Tensor>],
) -> Result<Vec<Vec<Tensor>>, Tried> {
    let failed = |what: &dyn std::fmt::Display| Tried::Failed(what.to_string());
    let members: Vec<&[Tensor]> = rows.iter().map(Vec::as_slice).collect();
    let joined = form.join(&members).ok_or_else(|| failed(&"they do not fit"))?;
    let outputs = session.run(&joined.inputs).map_err(|error| failed(&error))?;
    form.cut(&joined, &outputs).map_err(|error| Tried::Differs(error.to_string()))
}

/// Rows that are made up.
struct Made<'a> {
    signature: &'a Signature,
    settings: &'a PaddingSettings,
    form: &'a Form,
    /// Of dynamic dimensions other than the length.
    size: Option<usize>,
}

impl Made<'_> {
    /// Whether a long and a short row give together what they give alone.
    fn alike(&self, session: &mut dyn Session, value: u8) -> Result<(), Tried> {
        let long = self.size.filter(|size| *size > 1).unwrap_or(8);
        let rows: Result<Vec<_>, String> =
            [long, long / 2].into_iter().map(|length| self.row(length, value)).collect();
        let rows = rows.map_err(Tried::Failed)?;
        let mut alone = Vec::new();
        for row in &rows {
            alone.push(session.run(row).map_err(|error| Tried::Failed(error.to_string()))?);
        }
        let cut = together(session, self.form, &rows)?;
        for (alone, cut) in alone.iter().zip(&cut) {
            for (spec, (alone, cut)) in self.signature.outputs.iter().zip(alone.iter().zip(cut)) {
                if alone.shape() != cut.shape() || same(alone, cut, JOIN_TOLERANCE).is_err() {
                    let name = &spec.name;
                    return Err(Tried::Differs(format!(
                        "output '{name}' of a padded row is not what the row gives alone"
                    )));
                }
            }
        }
        Ok(())
    }

    /// With the mask that the gateway would make.
    fn row(&self, length: usize, value: u8) -> Result<Vec<Tensor>, String> {
        let mut named = Vec::new();
        for spec in &self.signature.inputs {
            if self.settings.mask.as_ref() == Some(&spec.name) {
                continue;
            }
            let mut shape = shape_of(spec, 1, self.size.unwrap_or(1));
            let padded = self.settings.inputs.iter().find(|input| input.name == spec.name);
            if let Some(dim) = padded.and_then(|input| shape.get_mut(input.axis)) {
                *dim = length;
            }
            let tensor = filled(spec, shape, &[value])?;
            named.push(NamedTensor { name: spec.name.clone(), tensor });
        }
        if let Some(padding) = &self.form.padding {
            padding.fill_mask(&mut named);
        }
        self.signature.bind(named).map_err(|failure| failure.message)
    }
}
