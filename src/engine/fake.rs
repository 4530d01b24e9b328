//! An engine for tests: `y = x + k` over one FP32 input of shape `[-1, width]`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::{EngineError, Model, Session};
use crate::domain::{DataType, Dim, Shape, Signature, Tensor, TensorSpec};

/// Counts runs and rows; may be slow.
#[derive(Debug)]
pub struct FakeModel {
    signature: Signature,
    plus: f32,
    pub cost: Duration,
    pub runs: Arc<AtomicUsize>,
    pub rows: Arc<AtomicUsize>,
}

impl FakeModel {
    pub fn new(width: usize, plus: f32) -> Self {
        let spec = |name: &str| TensorSpec {
            name: name.to_owned(),
            datatype: DataType::Fp32,
            shape: Some(vec![Dim::Dynamic(Some("n".to_owned())), Dim::Fixed(width)]),
        };
        Self {
            signature: Signature {
                inputs: vec![spec("x")],
                outputs: vec![spec("y")],
                batched: true,
            },
            plus,
            cost: Duration::ZERO,
            runs: Arc::default(),
            rows: Arc::default(),
        }
    }
}

impl Model for FakeModel {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn session(&self) -> Result<Box<dyn Session>, EngineError> {
        Ok(Box::new(FakeSession {
            inputs: self.signature.inputs.clone(),
            plus: self.plus,
            cost: self.cost,
            runs: Arc::clone(&self.runs),
            rows: Arc::clone(&self.rows),
        }))
    }
}

struct FakeSession {
    inputs: Vec<TensorSpec>,
    plus: f32,
    cost: Duration,
    runs: Arc<AtomicUsize>,
    rows: Arc<AtomicUsize>,
}

impl Session for FakeSession {
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        super::check_inputs(&self.inputs, inputs)?;
        let [x] = inputs else {
            return Err(EngineError::Run(format!("expected 1 input, got {}", inputs.len())));
        };
        self.runs.fetch_add(1, Ordering::Relaxed);
        self.rows.fetch_add(x.shape().first().copied().unwrap_or(1), Ordering::Relaxed);
        if !self.cost.is_zero() {
            std::thread::sleep(self.cost);
        }
        let mut data = Vec::with_capacity(x.data().len());
        for chunk in x.data().chunks_exact(4) {
            let value = f32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
            data.extend_from_slice(&(value + self.plus).to_le_bytes());
        }
        let y = Tensor::new(DataType::Fp32, Shape::from_slice(x.shape()), data.into());
        y.map(|y| vec![y]).map_err(|error| EngineError::Run(error.to_string()))
    }
}
