//! Which requests may share a batch; joins their inputs and cuts the outputs apart again. Pure.
//!
//! Invariant: what is cut for a member are the rows that its own inputs were joined at.

use super::BatchError;
use crate::domain::Tensor;

/// How requests of one lane become batches.
#[derive(Debug)]
pub(super) struct Form {
    /// The first dimension of every tensor is the batch; else requests are never joined.
    pub(super) batched: bool,
}

/// Inputs of a batch, and whose rows are where.
#[derive(Debug)]
pub(super) struct Joined {
    pub(super) inputs: Vec<Tensor>,
    /// Rows of each member, in order.
    members: Vec<usize>,
}

impl Form {
    /// Rows that a request brings; 1 where the model has no batch dimension.
    pub(super) fn rows(&self, inputs: &[Tensor]) -> usize {
        let first = inputs.first().filter(|_| self.batched);
        first.and_then(|tensor| tensor.shape().first().copied()).unwrap_or(1)
    }

    /// Two requests may share a batch: equal datatypes and shapes but for the rows.
    pub(super) fn joins(&self, a: &[Tensor], b: &[Tensor]) -> bool {
        let equal = |(a, b): (&Tensor, &Tensor)| {
            a.datatype() == b.datatype() && a.shape().get(1..) == b.shape().get(1..)
        };
        self.batched && a.len() == b.len() && a.iter().zip(b).all(equal)
    }

    /// Each input of all `members`, joined along the first axis; `None` if they do not join.
    pub(super) fn join(&self, members: &[&[Tensor]]) -> Option<Joined> {
        let first = members.first()?;
        let join = |at: usize| {
            let parts: Option<Vec<&Tensor>> = members.iter().map(|inputs| inputs.get(at)).collect();
            Tensor::concat(&parts?)
        };
        let inputs: Option<Vec<Tensor>> = (0..first.len()).map(join).collect();
        let members = members.iter().map(|inputs| self.rows(inputs)).collect();
        Some(Joined { inputs: inputs?, members })
    }
}

impl Joined {
    pub(super) fn rows(&self) -> usize {
        self.members.iter().sum()
    }

    /// Outputs of each member.
    ///
    /// # Errors
    /// When an output does not have the batch's rows.
    pub(super) fn cut(&self, outputs: &[Tensor]) -> Result<Vec<Vec<Tensor>>, BatchError> {
        let expected = self.rows();
        for (at, output) in outputs.iter().enumerate() {
            let got = output.shape().first().copied().unwrap_or(0);
            if got != expected {
                return Err(BatchError::OutputRows { at, got, expected });
            }
        }
        let mut from = 0;
        let mut cut = Vec::with_capacity(self.members.len());
        for rows in &self.members {
            let to = from + rows;
            cut.push(outputs.iter().filter_map(|output| output.rows(from, to)).collect());
            from = to;
        }
        Ok(cut)
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
        let form = Form { batched: true };
        let (a, b) = (vec![tensor(&[2, 3], 0)], vec![tensor(&[1, 3], 100)]);
        assert!(form.joins(&a, &b));
        let joined = form.join(&[&a, &b]).unwrap();
        assert_eq!(joined.inputs[0].shape(), [3, 3]);
        let cut = joined.cut(&joined.inputs).unwrap();
        assert_eq!(cut, [a, b]);
        let error = joined.cut(&[tensor(&[2, 3], 0)]).unwrap_err();
        assert!(matches!(error, BatchError::OutputRows { at: 0, got: 2, expected: 3 }));
    }

    #[test]
    fn only_equal_shapes_of_batched_models_join() {
        let form = Form { batched: true };
        let a = [tensor(&[2, 3], 0)];
        assert!(!form.joins(&a, &[tensor(&[2, 4], 0)]));
        assert!(!form.joins(&a, &[]));
        assert!(!Form { batched: false }.joins(&a, &a));
    }
}
