//! Refuses a tensor that would be too large before it is made.
//!
//! A failed allocation in Rust ends the process, and no caller can catch that, so the size is
//! worked out first: from shapes, and for ranges from the values they run between.

use tract_onnx::prelude::*;
use tract_onnx::tract_core::ops::array::Range;
use tract_onnx::tract_core::plan::{self, EvalContext};

/// Runs `plan`; no tensor may take more than `max` bytes.
pub(super) fn run(
    plan: &Arc<TypedRunnableModel>,
    inputs: TVec<TValue>,
    max: usize,
) -> TractResult<TVec<TValue>> {
    let mut state = plan.spawn()?;
    state.run_plan_with_eval(inputs, |context, state, node, inputs| -> TractResult<_> {
        check(context, node, &inputs, max)?;
        plan::eval(context, state, node, inputs)
    })
}

fn check(
    context: &EvalContext<'_>,
    node: &TypedNode,
    inputs: &[TValue],
    max: usize,
) -> TractResult<()> {
    for output in &node.outputs {
        // A concrete shape was there when the model was tried.
        if output.fact.shape.as_concrete().is_some() {
            continue;
        }
        let elements = match output.fact.shape.eval_to_usize(context.symbols) {
            Ok(shape) => shape.iter().fold(1_usize, |all, dim| all.saturating_mul(*dim)),
            // A range's length has a name, whose value is known when it is made.
            Err(_) if node.op_is::<Range>() => range(context, inputs)?,
            Err(_) => continue,
        };
        let bytes = elements.saturating_mul(output.fact.datum_type.size_of());
        if bytes > max {
            let name = &node.name;
            return Err(TractError::msg(format!(
                "'{name}' would take {bytes} bytes, the limit for one tensor is {max}"
            )));
        }
    }
    Ok(())
}

/// Elements between start and end, at most.
fn range(context: &EvalContext<'_>, inputs: &[TValue]) -> TractResult<usize> {
    let number = |tensor: &TValue| -> TractResult<f64> {
        if tensor.datum_type() == TDim::datum_type() {
            let dim = tensor.try_as_plain_ram()?.to_scalar::<TDim>()?;
            return Ok(dim.eval_to_i64(context.symbols)? as f64);
        }
        tensor.cast_to_scalar::<f64>()
    };
    let [start, end, step] = inputs else { return Ok(0) };
    let (start, end, step) = (number(start)?, number(end)?, number(step)?);
    let count = ((end - start) / step).abs().ceil();
    // What is no number is the operator's own to refuse.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
    let count = count as usize;
    Ok(count)
}
