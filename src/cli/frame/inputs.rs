//! Rows of a table as the inputs of a model, many at a time.

use half::{bf16, f16};

use super::bind::{Binding, Place};
use super::{Cell, Table};
use crate::cli::admin::Stop;
use crate::domain::{DataType, Dim, Signature, Tensor};
use crate::drift::feature::{Feature, Role};

/// Rows of one run, where a model takes many.
const ROWS: usize = 256;
/// A run with more bytes than these takes no further row.
const RUN_BYTES: usize = 16 << 20;

/// Where a model's inputs are in a table.
pub(in crate::cli) struct Inputs {
    sources: Vec<Source>,
    /// Columns of the table that are read.
    columns: Vec<usize>,
    batched: bool,
}

struct Source {
    datatype: DataType,
    /// Of one row.
    dims: Vec<Dim>,
    /// Places in [`Inputs::columns`]; of a list the only one.
    places: Vec<usize>,
}

/// Rows that are run at once.
struct Run<'a> {
    inputs: &'a Inputs,
    rows: usize,
    /// Of each input, of one row.
    shapes: Vec<Vec<usize>>,
    /// Of each input, the elements of the rows.
    data: Vec<Vec<u8>>,
}

/// What became of a table's rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::cli) struct Taken {
    pub(in crate::cli) rows: u64,
    /// An input was missing, or is not what the model takes.
    pub(in crate::cli) left_out: u64,
}

impl Inputs {
    /// # Errors
    /// When an input is in no column, or the shape of its rows cannot be told from one.
    pub(in crate::cli) fn new(
        signature: &Signature,
        features: &[Feature],
        binding: &Binding,
        table: &Table,
    ) -> Result<Self, Stop> {
        let (mut sources, mut columns) = (Vec::new(), Vec::new());
        for spec in &signature.inputs {
            let name = &spec.name;
            let wrong = |problem: &str| {
                let path = table.path().display();
                Stop::usage(format_args!("'{path}': input '{name}' {problem}"))
            };
            let dims = spec.shape.clone().ok_or_else(|| wrong("has no shape in the model"))?;
            let dims = dims[usize::from(signature.batched).min(dims.len())..].to_vec();
            if dims.iter().filter(|dim| matches!(dim, Dim::Dynamic(_))).count() > 1 {
                return Err(wrong("has rows of more than one size that varies"));
            }
            let elements = dims.iter().map(size).product();
            let place = binding.place_of(features, (Role::Input, name), elements);
            let own =
                match place.ok_or_else(|| wrong("has no column, or not one of each element"))? {
                    Place::List(at) => vec![at],
                    Place::Elements(places) => places,
                };
            let is_text = |at: &usize| table.columns[*at].datatype == DataType::Bytes;
            if own.iter().any(|at| is_text(at) != (spec.datatype == DataType::Bytes)) {
                let problem = format!("is {}, its columns are not", spec.datatype);
                return Err(wrong(&problem));
            }
            let places = (columns.len()..columns.len() + own.len()).collect();
            columns.extend(own);
            sources.push(Source { datatype: spec.datatype, dims, places });
        }
        Ok(Self { sources, columns, batched: signature.batched })
    }

    /// Calls `run` with the inputs of some rows, in the model's order, until there are none or it fails.
    pub(in crate::cli) fn read(
        &self,
        table: &Table,
        mut run: impl FnMut(&[Tensor]) -> Result<(), Stop>,
    ) -> Result<Taken, Stop> {
        let (mut taken, mut next, mut done) = (Taken::default(), Run::new(self), Ok(()));
        table.scan(&self.columns, |cells| {
            let added = self.shapes(cells).is_some_and(|shapes| {
                if !next.takes(&shapes) {
                    done = next.go(&mut run);
                }
                next.add(cells, shapes)
            });
            taken.rows += u64::from(added);
            taken.left_out += u64::from(!added);
            done.is_ok()
        })?;
        done?;
        next.go(&mut run)?;
        Ok(taken)
    }

    /// Shapes of a row of each input; `None` when one is missing, or does not fit.
    fn shapes(&self, cells: &[Cell<'_>]) -> Option<Vec<Vec<usize>>> {
        let shape = |source: &Source| {
            let len = match cells[*source.places.first()?] {
                Cell::Numbers(numbers) => numbers.len(),
                Cell::Texts(texts) => texts.len(),
                _ => source.places.len(),
            };
            let fixed = source.dims.iter().map(|dim| size(dim).unwrap_or(1)).product();
            let varies = len.checked_div(fixed).unwrap_or(0);
            let shape: Vec<usize> =
                source.dims.iter().map(|dim| size(dim).unwrap_or(varies)).collect();
            (shape.iter().product::<usize>() == len).then_some(shape)
        };
        self.sources.iter().map(shape).collect()
    }
}

impl<'a> Run<'a> {
    fn new(inputs: &'a Inputs) -> Self {
        Self { inputs, rows: 0, shapes: Vec::new(), data: vec![Vec::new(); inputs.sources.len()] }
    }

    /// Whether a row of these shapes can be run with those that are there.
    fn takes(&self, shapes: &[Vec<usize>]) -> bool {
        let rows_max = if self.inputs.batched { ROWS } else { 1 };
        let bytes: usize = self.data.iter().map(Vec::len).sum();
        self.rows == 0 || (self.rows < rows_max && bytes < RUN_BYTES && self.shapes == shapes)
    }

    /// Whether the row could be added.
    fn add(&mut self, cells: &[Cell<'_>], shapes: Vec<Vec<usize>>) -> bool {
        let before: Vec<usize> = self.data.iter().map(Vec::len).collect();
        let mut inputs = self.inputs.sources.iter().zip(&mut self.data);
        let added = inputs.all(|(source, data)| source.add(cells, data).is_some());
        if added {
            self.rows += 1;
            self.shapes = shapes;
        } else {
            for (data, before) in self.data.iter_mut().zip(before) {
                data.truncate(before);
            }
        }
        added
    }

    /// Runs what is there, and begins anew.
    fn go(&mut self, run: &mut impl FnMut(&[Tensor]) -> Result<(), Stop>) -> Result<(), Stop> {
        let Self { inputs, rows, shapes, data } = std::mem::replace(self, Self::new(self.inputs));
        if rows == 0 {
            return Ok(());
        }
        let parts = inputs.sources.iter().zip(shapes).zip(data);
        let tensors = parts.map(|((source, shape), data)| {
            let axis = inputs.batched.then_some(rows);
            Tensor::new(source.datatype, axis.into_iter().chain(shape).collect(), data.into())
        });
        run(&tensors.collect::<Result<Vec<_>, _>>().map_err(Stop::failed)?)
    }
}

impl Source {
    /// Adds a row's elements; `None` when one cannot be had.
    fn add(&self, cells: &[Cell<'_>], data: &mut Vec<u8>) -> Option<()> {
        for place in &self.places {
            match cells[*place] {
                Cell::Numbers(numbers) => {
                    numbers.iter().try_for_each(|number| encode(self.datatype, *number, data))?;
                }
                Cell::Number(number) => encode(self.datatype, number, data)?,
                Cell::Texts(texts) => {
                    texts.iter().try_for_each(|element| text((*element)?, data))?;
                }
                Cell::Text(element) => text(element, data)?,
                // What floats have for it.
                Cell::Missing => encode(self.datatype, f64::NAN, data)?,
            }
        }
        Some(())
    }
}

fn size(dim: &Dim) -> Option<usize> {
    match dim {
        Dim::Fixed(size) => Some(*size),
        Dim::Dynamic(_) => None,
    }
}

fn text(element: &[u8], data: &mut Vec<u8>) -> Option<()> {
    data.extend(u32::try_from(element.len()).ok()?.to_le_bytes());
    data.extend(element);
    Some(())
}

/// A number as an element: of floats the nearest, others have to be that number.
fn encode(datatype: DataType, number: f64, data: &mut Vec<u8>) -> Option<()> {
    match datatype {
        DataType::Bool => data.push(whole(number).filter(|bit: &u8| *bit < 2)?),
        DataType::Uint8 => data.push(whole(number)?),
        DataType::Uint16 => data.extend(whole::<u16>(number)?.to_le_bytes()),
        DataType::Uint32 => data.extend(whole::<u32>(number)?.to_le_bytes()),
        DataType::Uint64 => data.extend(whole::<u64>(number)?.to_le_bytes()),
        DataType::Int8 => data.extend(whole::<i8>(number)?.to_le_bytes()),
        DataType::Int16 => data.extend(whole::<i16>(number)?.to_le_bytes()),
        DataType::Int32 => data.extend(whole::<i32>(number)?.to_le_bytes()),
        DataType::Int64 => data.extend(whole::<i64>(number)?.to_le_bytes()),
        DataType::Fp16 => data.extend(f16::from_f64(number).to_le_bytes()),
        DataType::Bf16 => data.extend(bf16::from_f64(number).to_le_bytes()),
        DataType::Fp32 => data.extend(narrow(number).to_le_bytes()),
        DataType::Fp64 => data.extend(number.to_le_bytes()),
        DataType::Bytes => return None,
    }
    Some(())
}

#[expect(clippy::cast_possible_truncation, reason = "the nearest, as a client would send it")]
fn narrow(number: f64) -> f32 {
    number as f32
}

#[expect(clippy::cast_possible_truncation, reason = "a whole number; beyond the type it saturates")]
fn whole<T: TryFrom<i128>>(number: f64) -> Option<T> {
    let is_whole = number.is_finite() && number.fract() == 0.0;
    is_whole.then(|| T::try_from(number as i128).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::super::features::of_signature;
    use super::*;
    use crate::domain::TensorSpec;

    fn table(folder: &tempfile::TempDir, text: &str) -> Table {
        let path = folder.path().join("rows.csv");
        std::fs::write(&path, text).unwrap();
        Table::open(&path, None).unwrap()
    }

    fn spec(name: &str, datatype: DataType, dims: &[i64]) -> TensorSpec {
        let dim = |dim: &i64| usize::try_from(*dim).map_or(Dim::Dynamic(None), Dim::Fixed);
        TensorSpec { name: name.to_owned(), datatype, shape: Some(dims.iter().map(dim).collect()) }
    }

    fn read(signature: &Signature, table: &Table) -> Result<(Vec<String>, Taken), Stop> {
        let features = of_signature(signature);
        let binding = Binding::new(&features, table)?;
        let inputs = Inputs::new(signature, &features, &binding, table)?;
        let mut runs = Vec::new();
        let taken = inputs.read(table, |tensors| {
            let text = |tensor: &Tensor| format!("{:?}={:?}", tensor.shape(), &tensor.data()[..]);
            runs.push(tensors.iter().map(text).collect::<Vec<_>>().join(" "));
            Ok(())
        })?;
        Ok((runs, taken))
    }

    #[test]
    fn rows_become_inputs_in_the_models_order() {
        let folder = tempfile::tempdir().unwrap();
        let signature = Signature {
            inputs: vec![
                spec("x", DataType::Uint16, &[-1, 2]),
                spec("flag", DataType::Bool, &[-1, 1]),
            ],
            outputs: vec![spec("y", DataType::Fp32, &[-1, 3])],
            batched: true,
        };
        let rows = table(&folder, "flag,label,x[1],x[0]\n1,a,2,1\n0,b,4,3\n0,c,0.5,1\n2,d,1,1\n");
        let (runs, taken) = read(&signature, &rows).unwrap();
        assert_eq!(runs, ["[2, 2]=[1, 0, 2, 0, 3, 0, 4, 0] [2, 1]=[1, 0]"]);
        assert_eq!(taken, Taken { rows: 2, left_out: 2 });
        // One row at a time, where the model takes no more.
        let alone = Signature {
            inputs: vec![spec("x", DataType::Int8, &[2])],
            outputs: vec![spec("y", DataType::Fp32, &[3])],
            batched: false,
        };
        let rows = table(&folder, "x[0],x[1]\n-1,127\n1,\n1,128\n2,3\n");
        let (runs, taken) = read(&alone, &rows).unwrap();
        assert_eq!(runs, ["[2]=[255, 127]", "[2]=[2, 3]"]);
        assert_eq!(taken, Taken { rows: 2, left_out: 2 });
    }

    #[test]
    fn an_input_without_columns_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let signature = Signature {
            inputs: vec![spec("x", DataType::Fp32, &[-1, 2]), spec("z", DataType::Bytes, &[-1, 1])],
            outputs: Vec::new(),
            batched: true,
        };
        let problem = |text: &str| match read(&signature, &table(&folder, text)) {
            Err(Stop::Usage(problem)) => problem,
            other => panic!("{other:?}"),
        };
        assert!(problem("x[0],z\n1,a\n").contains("input 'x' has no column"));
        assert!(problem("x[0],x[1],z\n1,2,3\n").contains("input 'z' is BYTES"));
    }

    #[test]
    fn runs_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let signature = Signature {
            inputs: vec![spec("x", DataType::Fp32, &[-1, 1])],
            outputs: Vec::new(),
            batched: true,
        };
        let text = format!("x\n{}", "1.5\n".repeat(2 * ROWS + 1));
        let (runs, taken) = read(&signature, &table(&folder, &text)).unwrap();
        let starts = runs.iter().map(|run| run.split('=').next().unwrap());
        assert_eq!(starts.collect::<Vec<_>>(), ["[256, 1]", "[256, 1]", "[1, 1]"]);
        assert_eq!(taken.rows, 513);
    }
}
