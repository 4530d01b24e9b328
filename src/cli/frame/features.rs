//! Which features a table or a signature has.

use std::collections::BTreeMap;

use super::{Cell, Column, Table};
use crate::cli::admin::Stop;
use crate::domain::{DataType, Signature, TensorSpec};
use crate::drift::feature::{ELEMENTS_MAX, Feature, Role, of_rows, of_spec};

/// Rows that are looked at to learn how long lists are.
const ROWS_LOOKED_AT: usize = 1000;

/// A role and a tensor's name, from a column's.
pub(super) fn named(column: &str) -> (Option<Role>, &str) {
    match (column.strip_prefix("in_"), column.strip_prefix("out_")) {
        (Some(tensor), _) => (Some(Role::Input), tensor),
        (_, Some(tensor)) => (Some(Role::Output), tensor),
        _ => (None, column),
    }
}

/// `x[3]` is the element 3 of `x`.
fn element(name: &str) -> Option<(&str, usize)> {
    let (tensor, rest) = name.strip_suffix(']')?.rsplit_once('[')?;
    Some((tensor, rest.parse().ok()?))
}

/// The features that a signature has.
pub(in crate::cli) fn of_signature(signature: &Signature) -> Vec<Feature> {
    let of = |role: Role, specs: &[TensorSpec]| -> Vec<Feature> {
        specs.iter().flat_map(|spec| of_spec(role, spec, signature.batched)).collect()
    };
    let mut features = of(Role::Input, &signature.inputs);
    features.extend(of(Role::Output, &signature.outputs));
    features
}

/// The features that a table has by itself.
pub(in crate::cli) fn of_table(table: &Table) -> Result<Vec<Feature>, Stop> {
    let mut elements: BTreeMap<(Role, String), (DataType, usize)> = BTreeMap::new();
    let mut features = Vec::new();
    let mut lists = Vec::new();
    for (at, column) in table.columns.iter().enumerate() {
        let (role, tensor) = match named(&column.name) {
            (None, _) if table.ledger => continue,
            // Of a plain table `in_x` may be any name; of a list it is a tensor's.
            (Some(role), tensor) if table.ledger || column.list => (role, tensor),
            _ => (Role::Input, column.name.as_str()),
        };
        if column.list {
            if !tensor.ends_with("_shape") || !table.ledger {
                lists.push((at, role, tensor));
            }
        } else if let Some((tensor, element)) = element(tensor) {
            let of = elements.entry((role, tensor.to_owned())).or_insert((column.datatype, 0));
            of.1 = of.1.max(element.saturating_add(1));
        } else if !table.ledger {
            features.extend(of_rows(role, tensor, column.datatype, Some(&[])));
        }
    }
    for ((role, tensor), (datatype, count)) in elements {
        if count <= ELEMENTS_MAX {
            features.extend(of_rows(role, &tensor, datatype, Some(&[count])));
            continue;
        }
        // Too many for one row: features that have nothing to do with each other.
        let columns = table.columns.iter().filter(|column| !column.list);
        for column in columns {
            let name = if table.ledger { named(&column.name).1 } else { &column.name };
            if element(name).is_some_and(|(of, _)| of == tensor) {
                features.extend(of_rows(role, name, column.datatype, Some(&[])));
            }
        }
    }
    for (at, role, tensor) in lists {
        let row = shape_of_rows(table, at)?;
        features.extend(of_rows(role, tensor, table.columns[at].datatype, row.as_deref()));
    }
    Ok(features)
}

/// The shape of one row of a list's tensor, from the first of them; `None` when they differ.
fn shape_of_rows(table: &Table, at: usize) -> Result<Option<Vec<usize>>, Stop> {
    let shape = shape_column(table, &table.columns[at]);
    let wanted: Vec<usize> = [Some(at), shape].into_iter().flatten().collect();
    let (mut shapes, mut looked) = (Vec::<Vec<usize>>::new(), 0);
    table.scan(&wanted, |cells| {
        let len = match cells[0] {
            Cell::Numbers(numbers) => numbers.len(),
            Cell::Texts(texts) => texts.len(),
            _ => return true,
        };
        let row = match cells.get(1) {
            // The first axis is that of the rows.
            Some(Cell::Numbers(shape)) if !shape.is_empty() => {
                shape[1..].iter().map(|size| whole(*size)).collect()
            }
            _ => vec![len],
        };
        if !shapes.contains(&row) {
            shapes.push(row);
        }
        looked += 1;
        looked < ROWS_LOOKED_AT && shapes.len() < 2
    })?;
    Ok(match &mut shapes[..] {
        [row] => Some(std::mem::take(row)),
        _ => None,
    })
}

#[expect(clippy::cast_possible_truncation, reason = "a size of a list that was read")]
#[expect(clippy::cast_sign_loss, reason = "held at 0")]
pub(super) fn whole(size: f64) -> usize {
    size.max(0.0) as usize
}

pub(super) fn shape_column(table: &Table, list: &Column) -> Option<usize> {
    table.ledger.then(|| table.column(&format!("{}_shape", list.name))).flatten()
}
