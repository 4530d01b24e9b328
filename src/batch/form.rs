//! Which requests may share a batch; joins their inputs and cuts the outputs apart again. Pure.
//!
//! Invariant: what is cut for a member are the rows that its own inputs were joined at.

use super::{BatchError, Padding, Work};
use crate::domain::Tensor;

/// How requests of one lane become batches.
#[derive(Debug)]
pub struct Form {
    /// The first dimension of every tensor is the batch; else requests are never joined.
    pub batched: bool,
    /// How requests of unequal length are joined; `None`: they are not.
    pub padding: Option<Padding>,
}

/// Inputs of a batch, and whose rows are where.
#[derive(Debug)]
pub struct Joined {
    pub inputs: Vec<Tensor>,
    members: Vec<Member>,
    /// The length that all were padded to; `None`: they were not.
    padded_to: Option<usize>,
}

#[derive(Debug)]
struct Member {
    rows: usize,
    /// Of its padded inputs; 0 in a model without padding.
    length: usize,
}

/// Elements of padded inputs that ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Elements {
    pub(super) real: usize,
    pub(super) padding: usize,
}

impl Form {
    /// Refuses what has no length to go by.
    pub(super) fn check(&self, inputs: &[Tensor]) -> Result<(), BatchError> {
        match &self.padding {
            None => Ok(()),
            Some(padding) => padding.length(inputs).map(|_| ()),
        }
    }

    /// Rows that a request brings; 1 where the model has no batch dimension.
    pub(super) fn rows(&self, inputs: &[Tensor]) -> usize {
        let first = inputs.first().filter(|_| self.batched);
        first.and_then(|tensor| tensor.shape().first().copied()).unwrap_or(1)
    }

    /// Elements that a request takes of a batch: with padding, as many as its bucket's length makes.
    pub fn elements(&self, inputs: &[Tensor]) -> usize {
        match &self.padding {
            Some(padding) => padding.elements(inputs),
            None => inputs.iter().map(Tensor::elements).fold(0, usize::saturating_add),
        }
    }

    /// A request with all that queue and cost want to know of it.
    pub(super) fn measure(&self, inputs: Vec<Tensor>) -> Work {
        let (rows, elements) = (self.rows(&inputs), self.elements(&inputs));
        let bytes = inputs.iter().map(|tensor| tensor.data().len()).fold(0, usize::saturating_add);
        Work { inputs, rows, elements, bytes }
    }

    /// Two requests may share a batch: equal datatypes and shapes but for the rows and, with
    /// padding, for lengths of one bucket.
    pub fn joins(&self, a: &[Tensor], b: &[Tensor]) -> bool {
        let equal = |(a, b): (&Tensor, &Tensor)| {
            a.datatype() == b.datatype() && a.shape().get(1..) == b.shape().get(1..)
        };
        match &self.padding {
            _ if !self.batched => false,
            Some(padding) => padding.joins(a, b),
            None => a.len() == b.len() && a.iter().zip(b).all(equal),
        }
    }

    /// Each input of all `members`, joined along the first axis; `None` if they do not join.
    pub fn join(&self, members: &[&[Tensor]]) -> Option<Joined> {
        let first = members.first()?;
        let member = |inputs: &&[Tensor]| {
            let length = self.padding.as_ref().map_or(Some(0), |pad| pad.length(inputs).ok())?;
            Some(Member { rows: self.rows(inputs), length })
        };
        let described: Vec<Member> = members.iter().map(member).collect::<Option<_>>()?;
        let lengths: Vec<usize> = described.iter().map(|member| member.length).collect();
        let target = self.padding.as_ref().and_then(|pad| Some((pad, pad.target(&lengths)?)));
        let join = |at: usize| {
            let parts: Option<Vec<&Tensor>> = members.iter().map(|inputs| inputs.get(at)).collect();
            match target {
                Some((padding, target)) => padding.join(at, &parts?, target),
                None => Tensor::concat(&parts?),
            }
        };
        let inputs: Option<Vec<Tensor>> = (0..first.len()).map(join).collect();
        let padded_to = target.map(|(_, target)| target);
        Some(Joined { inputs: inputs?, members: described, padded_to })
    }

    /// Outputs of each member, in order, without padding.
    ///
    /// # Errors
    /// When an output does not have the batch's rows or its length.
    pub fn cut(&self, joined: &Joined, outputs: &[Tensor]) -> Result<Vec<Vec<Tensor>>, BatchError> {
        let expected = joined.rows();
        for (at, output) in outputs.iter().enumerate() {
            let got = output.shape().first().copied().unwrap_or(0);
            if got != expected {
                return Err(BatchError::OutputRows { at, got, expected });
            }
        }
        let padding = self.padding.as_ref().zip(joined.padded_to);
        let mut from = 0;
        let mut cut = Vec::with_capacity(joined.members.len());
        for Member { rows, length } in &joined.members {
            let to = from + rows;
            let rows = outputs.iter().filter_map(|output| output.rows(from, to));
            cut.push(match padding {
                None => rows.collect(),
                Some((padding, target)) => {
                    let cut = |(at, rows)| padding.cut(at, rows, target, *length);
                    rows.enumerate().map(cut).collect::<Result<_, _>>()?
                }
            });
            from = to;
        }
        Ok(cut)
    }

    /// What a run of these requests, as `inputs`, had of real elements and of padding; `None` for
    /// a model without padding.
    pub(super) fn counted(&self, members: &[&[Tensor]], inputs: &[Tensor]) -> Option<Elements> {
        let padding = self.padding.as_ref()?;
        let count = |inputs: &[Tensor]| -> usize {
            let padded = inputs.iter().enumerate().filter(|(at, _)| padding.pads(*at));
            padded.map(|(_, tensor)| tensor.elements()).sum()
        };
        let real = members.iter().map(|inputs| count(inputs)).sum();
        Some(Elements { real, padding: count(inputs).saturating_sub(real) })
    }
}

impl Joined {
    pub(super) fn rows(&self) -> usize {
        self.members.iter().map(|member| member.rows).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{DataType, Shape};

    fn tensor(shape: &[usize], first: u8) -> Tensor {
        let size: usize = shape.iter().product();
        let data: Vec<u8> = (first..).take(size).collect();
        Tensor::new(DataType::Uint8, Shape::from_slice(shape), data.into()).unwrap()
    }

    #[test]
    fn what_is_joined_is_cut_at_the_same_rows() {
        let form = Form { batched: true, padding: None };
        let (a, b) = (vec![tensor(&[2, 3], 0)], vec![tensor(&[1, 3], 100)]);
        assert!(form.joins(&a, &b));
        let joined = form.join(&[&a, &b]).unwrap();
        assert_eq!(joined.inputs[0].shape(), [3, 3]);
        let cut = form.cut(&joined, &joined.inputs).unwrap();
        assert_eq!(cut, [a, b]);
        let error = form.cut(&joined, &[tensor(&[2, 3], 0)]).unwrap_err();
        assert!(matches!(error, BatchError::OutputRows { at: 0, got: 2, expected: 3 }));
    }

    #[test]
    fn only_equal_shapes_of_batched_models_join() {
        let form = Form { batched: true, padding: None };
        let a = [tensor(&[2, 3], 0)];
        assert!(!form.joins(&a, &[tensor(&[2, 4], 0)]));
        assert!(!form.joins(&a, &[]));
        assert!(!Form { batched: false, padding: None }.joins(&a, &a));
    }
}
