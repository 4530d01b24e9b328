//! An engine for tests: `y = x + k` over one FP32 input of shape `[-1, width]`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::{EngineError, Model, Session, Stop};
use crate::domain::{DataType, Dim, Shape, Signature, Tensor, TensorSpec};

/// Counts runs and rows; may be slow, and can be stopped then.
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
            stop: Arc::default(),
        }))
    }
}

struct FakeSession {
    inputs: Vec<TensorSpec>,
    plus: f32,
    cost: Duration,
    runs: Arc<AtomicUsize>,
    rows: Arc<AtomicUsize>,
    stop: Arc<FakeStop>,
}

#[derive(Default)]
struct FakeStop(AtomicBool);

impl Stop for FakeStop {
    fn stop(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    fn reset(&self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl FakeSession {
    /// Takes its time, unless stopped.
    fn work(&self) -> Result<(), EngineError> {
        let started = Instant::now();
        loop {
            let left = self.cost.saturating_sub(started.elapsed());
            if self.stop.0.load(Ordering::SeqCst) {
                return Err(EngineError::Run("stopped".to_owned()));
            }
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(5)));
        }
    }
}

impl Session for FakeSession {
    fn stopper(&self) -> Option<Arc<dyn Stop>> {
        Some(Arc::clone(&self.stop) as Arc<dyn Stop>)
    }

    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        super::check_inputs(&self.inputs, inputs)?;
        let [x] = inputs else {
            return Err(EngineError::Run(format!("expected 1 input, got {}", inputs.len())));
        };
        self.runs.fetch_add(1, Ordering::Relaxed);
        self.rows.fetch_add(x.shape().first().copied().unwrap_or(1), Ordering::Relaxed);
        self.work()?;
        let mut data = Vec::with_capacity(x.data().len());
        for chunk in x.data().chunks_exact(4) {
            let value = f32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
            data.extend_from_slice(&(value + self.plus).to_le_bytes());
        }
        let y = Tensor::new(DataType::Fp32, Shape::from_slice(x.shape()), data.into());
        y.map(|y| vec![y]).map_err(|error| EngineError::Run(error.to_string()))
    }
}
