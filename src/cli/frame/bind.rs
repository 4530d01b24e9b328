//! Which columns of a table are which features.
//!
//! | column | is |
//! | --- | --- |
//! | a number or a text, `x` or `x[3]` | the feature of that name, of an input before that of an output |
//! | a list, `x` | the rows of that tensor |
//! | `in_x`, `out_x` | the same, of an input, of an output: as the ledger's Parquet calls them |
//! | any, where none has a name of the features, and there is one matrix input | its elements, in order |

use super::features::{named, shape_column, whole};
use super::{Cell, Column, Table};
use crate::cli::admin::Stop;
use crate::drift::feature::{Feature, Part, Role, Value};
use crate::drift::rows::{Plan, Scratch};

/// A table's columns, bound to features.
pub(in crate::cli) struct Binding {
    /// Columns that are read, and what each is.
    columns: Vec<(usize, Is)>,
    /// Places in `columns` of the ledger's own that say whether a row counts.
    checks: Vec<(usize, Check)>,
    lists: Plan,
    /// Outputs whose scores are in columns of their own, and places of those.
    scored: Vec<(String, Vec<usize>)>,
    of_scores: Plan,
    /// Features that no column is, those aside that follow from others.
    lacking: Vec<usize>,
    by_order: bool,
}

enum Is {
    Feature(usize),
    List(List),
    /// The shape of the list whose place in `columns` this is.
    Shape,
    Check,
}

/// Columns of the table that a tensor's rows are in.
#[derive(Debug)]
pub(super) enum Place {
    List(usize),
    /// Element by element.
    Elements(Vec<usize>),
}

struct List {
    role: Role,
    tensor: String,
    /// Elements of a row, where the features say so.
    per_row: Option<usize>,
    shape: Option<usize>,
}

#[derive(Clone, Copy)]
enum Check {
    Is(&'static str),
    Absent,
}

/// The ledger's columns that say whether a row is a prediction that was answered.
const CHECKS: [(&str, Check); 3] =
    [("kind", Check::Is("prediction")), ("status", Check::Is("ok")), ("shadow_of", Check::Absent)];

impl Binding {
    /// Binds what can be.
    ///
    /// # Errors
    /// When no column is a feature.
    pub(in crate::cli) fn new(features: &[Feature], table: &Table) -> Result<Self, Stop> {
        let mut columns: Vec<(usize, Is)> = Vec::new();
        for (at, column) in table.columns.iter().enumerate() {
            match column.list {
                false => {
                    let number = scalar(features, table, column);
                    columns.extend(number.map(|number| (at, Is::Feature(number))));
                }
                true => {
                    let Some((role, tensor)) = list(features, column) else { continue };
                    let per_row = elements_of(features, role, &tensor);
                    let shape = shape_column(table, column);
                    let shape = shape.map(|shape| {
                        columns.push((shape, Is::Shape));
                        columns.len() - 1
                    });
                    columns.push((at, Is::List(List { role, tensor, per_row, shape })));
                }
            }
        }
        let by_order = columns.is_empty();
        if by_order {
            columns = in_order(features, table);
        }
        let lacking = lacking(features, &columns);
        if columns.is_empty() {
            return Err(Stop::usage(format_args!(
                "'{}': no column is a feature; expected {}",
                table.path().display(),
                first_names(features, &lacking)
            )));
        }
        let mut checks = Vec::new();
        for (name, check) in CHECKS.iter().filter(|_| table.ledger) {
            if let Some(at) = table.column(name) {
                checks.push((columns.len(), *check));
                columns.push((at, Is::Check));
            }
        }
        let scored = scored(features, &columns);
        let of_scores = features.iter().enumerate().filter(|(_, feature)| feature.of_scores());
        Ok(Self {
            lists: Plan::new(features),
            of_scores: Plan::numbered(of_scores),
            columns,
            checks,
            scored,
            lacking,
            by_order,
        })
    }

    /// What a reader should know; `filled` are features that have their values from elsewhere.
    pub(in crate::cli) fn notes(&self, features: &[Feature], filled: &[usize]) -> Vec<String> {
        let mut notes = Vec::new();
        if self.by_order {
            notes.push("no column has a feature's name: they are taken in their order".to_owned());
        }
        let without = self.lacking.iter().copied().filter(|number| !filled.contains(number));
        let without: Vec<usize> = without.collect();
        if !without.is_empty() {
            let (count, names) = (without.len(), first_names(features, &without));
            notes.push(format!("{count} features have no column: {names}"));
        }
        notes
    }

    /// Whether a tensor has features, and no column of any.
    pub(in crate::cli) fn lacks(&self, features: &[Feature], role: Role, tensor: &str) -> bool {
        let of = |feature: &Feature| feature.role == role && feature.tensor == tensor;
        let own = features.iter().enumerate().filter(|(_, f)| of(f) && !f.of_scores());
        let mut own = own.map(|(number, _)| self.lacking.contains(&number)).peekable();
        own.peek().is_some() && own.all(|lacks| lacks)
    }

    /// The columns that a tensor's elements are in, of `elements` each; `None` when some have none.
    pub(super) fn place_of(
        &self,
        features: &[Feature],
        (role, tensor): (Role, &str),
        elements: Option<usize>,
    ) -> Option<Place> {
        let list = |(at, is): &(usize, Is)| match is {
            Is::List(list) if list.role == role && list.tensor == tensor => Some(*at),
            _ => None,
        };
        if let Some(at) = self.columns.iter().find_map(list) {
            return Some(Place::List(at));
        }
        let element = |element: usize| {
            let is_it = |number: usize| {
                let of = &features[number];
                of.role == role && of.tensor == tensor && of.part == Part::Element(element)
            };
            let bound = |is: &Is| matches!(is, Is::Feature(number) if is_it(*number));
            self.columns.iter().find(|(_, is)| bound(is)).map(|(at, _)| *at)
        };
        (0..elements?).map(element).collect::<Option<_>>().map(Place::Elements)
    }

    /// Calls `put` with the number of a feature and its value, for each row of the table.
    pub(in crate::cli) fn read(
        &self,
        table: &Table,
        mut put: impl FnMut(usize, Value<'_>),
    ) -> Result<(), Stop> {
        let wanted: Vec<usize> = self.columns.iter().map(|(at, _)| *at).collect();
        let (mut scratch, mut row) = (Scratch::default(), Vec::new());
        table.scan(&wanted, |cells| {
            let counts = |(at, check): &(usize, Check)| match (check, cells[*at]) {
                (Check::Is(word), Cell::Text(text)) => text == word.as_bytes(),
                (Check::Is(_), _) => false,
                (Check::Absent, cell) => cell == Cell::Missing,
            };
            if self.checks.iter().all(counts) {
                self.row(cells, table.ledger, &mut scratch, &mut row, &mut put);
            }
            true
        })
    }

    fn row(
        &self,
        cells: &[Cell<'_>],
        ledger: bool,
        scratch: &mut Scratch,
        row: &mut Vec<f64>,
        put: &mut impl FnMut(usize, Value<'_>),
    ) {
        for ((_, is), cell) in self.columns.iter().zip(cells) {
            match (is, cell) {
                (Is::Feature(number), Cell::Number(value)) => put(*number, Value::Number(*value)),
                (Is::Feature(number), Cell::Text(text)) => put(*number, Value::Text(text)),
                (Is::Feature(number), _) => put(*number, Value::Missing),
                // Not recorded is not missing: a policy or an erasure left it out.
                (Is::List(_), Cell::Missing) if ledger => {}
                (Is::List(list), cell) => self.list(list, cell, cells, scratch, put),
                (Is::Shape | Is::Check, _) => {}
            }
        }
        for (tensor, places) in &self.scored {
            row.clear();
            row.extend(places.iter().map(|place| match cells[*place] {
                Cell::Number(score) => score,
                _ => f64::NAN,
            }));
            self.of_scores.read_numbers(Role::Output, tensor, row, scratch, &mut *put);
        }
    }

    /// A list holds one row of its tensor, or the rows of a request one after the other.
    fn list(
        &self,
        list: &List,
        cell: &Cell<'_>,
        cells: &[Cell<'_>],
        scratch: &mut Scratch,
        put: &mut impl FnMut(usize, Value<'_>),
    ) {
        let len = match cell {
            Cell::Numbers(numbers) => numbers.len(),
            Cell::Texts(texts) => texts.len(),
            _ => 0,
        };
        let by_shape = list.shape.and_then(|place| match cells[place] {
            Cell::Numbers([rows, ..]) => len.checked_div(whole(*rows)),
            _ => None,
        });
        let per_row = list.per_row.filter(|size| len % size == 0).or(by_shape);
        let per_row = per_row.unwrap_or(len).max(1);
        let (role, tensor) = (list.role, list.tensor.as_str());
        match cell {
            Cell::Numbers(numbers) if !numbers.is_empty() => {
                for row in numbers.chunks(per_row) {
                    self.lists.read_numbers(role, tensor, row, scratch, &mut *put);
                }
            }
            Cell::Texts(texts) if !texts.is_empty() => {
                for row in texts.chunks(per_row) {
                    self.lists.read_texts(role, tensor, row, &mut *put);
                }
            }
            _ => self.lists.read_numbers(role, tensor, &[], scratch, &mut *put),
        }
    }
}

fn scalar(features: &[Feature], table: &Table, column: &Column) -> Option<usize> {
    let find = |role: Option<Role>, name: &str| {
        let is = |f: &Feature| f.name == name && role.is_none_or(|role| f.role == role);
        features.iter().position(is)
    };
    // The ledger's own columns are no tensor's: `version`, `rows`.
    let plain = if table.ledger { None } else { find(None, &column.name) };
    let (role, name) = named(&column.name);
    plain.or_else(|| role.and_then(|_| find(role, name)))
}

fn list(features: &[Feature], column: &Column) -> Option<(Role, String)> {
    let has = |role: Role, name: &str| features.iter().any(|f| f.role == role && f.tensor == name);
    let (role, name) = named(&column.name);
    if let Some(role) = role.filter(|role| has(*role, name)) {
        return Some((role, name.to_owned()));
    }
    let roles = [Role::Input, Role::Output];
    let role = roles.into_iter().find(|role| has(*role, &column.name))?;
    Some((role, column.name.clone()))
}

/// How many elements a row of a tensor has, if it is watched element by element.
fn elements_of(features: &[Feature], role: Role, tensor: &str) -> Option<usize> {
    let of_tensor = features.iter().filter(|f| f.role == role && f.tensor == tensor);
    let place = |feature: &Feature| match feature.part {
        Part::Element(at) => Some(at + 1),
        _ => None,
    };
    of_tensor.filter_map(place).max()
}

/// The columns as the elements of the only input that is a matrix, if there are as many.
fn in_order(features: &[Feature], table: &Table) -> Vec<(usize, Is)> {
    let mut inputs: Vec<&str> = features
        .iter()
        .filter(|feature| feature.role == Role::Input)
        .map(|feature| feature.tensor.as_str())
        .collect();
    inputs.dedup();
    let ([tensor], false) = (&inputs[..], table.ledger) else { return Vec::new() };
    let count = elements_of(features, Role::Input, tensor).unwrap_or(0);
    let scalars: Vec<usize> =
        (0..table.columns.len()).filter(|at| !table.columns[*at].list).collect();
    if count < 2 || scalars.len() != count {
        return Vec::new();
    }
    let bound = |(element, column): (usize, usize)| {
        let is = |f: &Feature| f.role == Role::Input && f.part == Part::Element(element);
        Some((column, Is::Feature(features.iter().position(is)?)))
    };
    scalars.into_iter().enumerate().filter_map(bound).collect()
}

/// Features that no column is, those aside that follow from others.
fn lacking(features: &[Feature], columns: &[(usize, Is)]) -> Vec<usize> {
    let bound = |(number, feature): &(usize, &Feature)| {
        columns.iter().any(|(_, is)| match is {
            Is::Feature(of) => of == number,
            Is::List(list) => list.role == feature.role && list.tensor == feature.tensor,
            Is::Shape | Is::Check => false,
        })
    };
    let all = features.iter().enumerate().filter(|(_, feature)| !feature.of_scores());
    all.filter(|each| !bound(each)).map(|(number, _)| number).collect()
}

fn first_names(features: &[Feature], numbers: &[usize]) -> String {
    let mut names: Vec<&str> = numbers.iter().take(8).map(|n| features[*n].name.as_str()).collect();
    if numbers.len() > names.len() {
        names.push("…");
    }
    names.join(", ")
}

/// Outputs whose scores each have a column.
fn scored(features: &[Feature], columns: &[(usize, Is)]) -> Vec<(String, Vec<usize>)> {
    let outputs = features.iter().filter(|feature| feature.part == Part::Class);
    let places = |output: &Feature| -> Option<Vec<usize>> {
        let count = elements_of(features, Role::Output, &output.tensor)?;
        let place = |element: usize| {
            columns.iter().position(|(_, is)| match is {
                Is::Feature(number) => {
                    let of = &features[*number];
                    of.role == Role::Output
                        && of.tensor == output.tensor
                        && of.part == Part::Element(element)
                }
                _ => false,
            })
        };
        (0..count).map(place).collect()
    };
    outputs.filter_map(|output| Some((output.tensor.clone(), places(output)?))).collect()
}

#[cfg(test)]
mod tests;
